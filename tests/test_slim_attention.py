"""slim_attention against softmax(q kᵀ / sqrt(d) + bias) v, written out in float64."""

import math

import pytest
import torch
from references import off
from torch import Tensor

from slimvit.ops import attention_probabilities, slim_attention

SHAPES = [(1, 1), (1, 63), (63, 63), (37, 63), (104, 197), (1, 257), (257, 257)]


def explicit(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    logits = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(q.shape[-1])
    if key_bias is not None:
        bias = key_bias.double()
        logits = logits + (bias[:, None, None] if bias.dim() == 2 else bias)
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return torch.einsum("bhnm,bhmd->bhnd", weights, v)


def qkv(batch: int, n: int, m: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n + 1000 * m)
    shapes = [(batch, 3, rows, 16) for rows in (n, m, m)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def bias(kind: str | None, batch: int, m: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
    if kind is None:
        return None
    shape = (m,) if kind == "m" else (batch, m)
    return torch.randn(shape, generator=torch.Generator().manual_seed(m)).to(dtype)


@pytest.mark.parametrize(("n", "m"), SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", [None, "m", "Bm"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 5e-6)])
def test_explicit(poison_empty, n, m, batch, kind, dtype, limit):
    q, k, v = qkv(batch, n, m, dtype)
    key_bias = bias(kind, batch, m, dtype)
    got = slim_attention(q, k, v, key_bias)
    assert got.dtype == dtype
    assert off(got, explicit(q, k, v, key_bias)) < limit


@pytest.mark.parametrize("kind", [None, "m", "Bm"])
def test_bfloat16_is_as_good_as_torch(kind):
    q, k, v = qkv(3, 104, 197, torch.bfloat16)
    key_bias = bias(kind, 3, 197, torch.bfloat16)
    wanted = explicit(q, k, v, key_bias)
    torchs_own = off(torch.nn.functional.scaled_dot_product_attention(q, k, v), explicit(q, k, v))
    assert off(slim_attention(q, k, v, key_bias), wanted) < 2 * torchs_own


def test_a_key_can_be_masked_out():
    q, k, v = qkv(1, 5, 7)
    masked = torch.zeros(7)
    masked[[2, 4]] = -torch.inf
    left = [0, 1, 3, 5, 6]
    got = slim_attention(q, k, v, masked)
    assert off(got, slim_attention(q, k[:, :, left], v[:, :, left])) < 1e-6


def test_not_contiguous():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(3, 37, 63))
    assert not q.is_contiguous()
    assert off(slim_attention(q, k, v), explicit(q, k, v)) < 5e-6


def test_gradients():
    q, k, v = (x.requires_grad_() for x in qkv(2, 2, 3, torch.float64))
    key_bias = bias("Bm", 2, 3, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(slim_attention, (q, k, v, key_bias))


def test_dropout_drops():
    q, k, v = qkv(1, 63, 63)
    torch.manual_seed(0)
    assert off(slim_attention(q, k, v, dropout=0.5), slim_attention(q, k, v)) > 0.1


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_probabilities(n, m):
    q, k, v = qkv(3, n, m)
    weights = attention_probabilities(q, k)
    assert weights.shape == (3, 3, n, m)
    assert off(weights.sum(-1), torch.ones(3, 3, n)) < 1e-5
    assert off(weights @ v, explicit(q, k, v)) < 5e-6
