"""scatter_tokens against a loop over images and tokens."""

import pytest
import torch

from slimvit.ops import scatter_tokens


def loop(x, index, length):
    batch, kept, width = x.shape
    out = torch.zeros(batch, length, width, dtype=x.dtype)
    for image in range(batch):
        for token in range(kept):
            place = index[token] if index.dim() == 1 else index[image, token]
            out[image, place] = x[image, token]
    return out


@pytest.mark.parametrize(("kept", "length"), [(1, 1), (1, 197), (63, 197), (63, 63), (104, 257)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loop(poison_empty, kept, length, batch, per_image, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, kept, 5, generator=generator).to(dtype)
    rows = batch if per_image else 1
    index = torch.stack([torch.randperm(length, generator=generator)[:kept] for _ in range(rows)])
    index = index if per_image else index[0]
    got = scatter_tokens(x, index, length)
    assert got.dtype == dtype
    assert torch.equal(got, loop(x, index, length))


def test_not_contiguous():
    x = torch.randn(4, 3, 5).transpose(0, 1)
    index = torch.tensor([6, 0, 3, 1])
    assert torch.equal(scatter_tokens(x, index, 7), loop(x, index, 7))


@pytest.mark.parametrize("per_image", [False, True])
def test_gradients(per_image):
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[4, 0, 2], [1, 4, 3]]) if per_image else torch.tensor([4, 0, 2])
    assert torch.autograd.gradcheck(lambda x: scatter_tokens(x, index, 5), x)
