"""One block of DeiT in plain PyTorch: dense, and slimmed from 131 to 111 of 197 tokens.

The slim block is timed only after it has given the dense block's rows.
"""

import pytest
import timm
import torch

from slimvit.models import block_parts
from slimvit.ops import slim_block

BATCH, TOKENS, ALIVE, KEPT = 8, 197, 131, 111
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@pytest.fixture(params=["tiny", "small", "base"])
def size(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def block(request, size):
    """timm's first block, and what slimvit reads of it."""
    torch.manual_seed(0)
    model = timm.create_model(f"deit_{size}_patch16_224").eval().to(request.param)
    return model.blocks[0], block_parts(model)[0]


def tokens(block, number):
    weight = block.norm1.weight
    return torch.randn(number, BATCH, len(weight)).to(weight.dtype)  # [m, B, D]


@torch.inference_mode()
def test_dense_block(benchmark, block):
    module, _ = block
    x = tokens(module, TOKENS).transpose(0, 1).contiguous()  # [B, N, D]
    benchmark(module, x)


@torch.inference_mode()
@pytest.mark.parametrize("alive, kept", [(TOKENS, TOKENS), (ALIVE, KEPT)], ids=["all", "slim"])
def test_slim_block(benchmark, block, alive, kept):
    module, parts = block
    x = tokens(module, alive)
    wanted = module(x.transpose(0, 1))[:, :kept].transpose(0, 1)
    got = slim_block(x, parts, kept)
    assert (got - wanted).norm() <= TOLERANCE[x.dtype] * wanted.norm()
    benchmark(slim_block, x, parts, kept)
