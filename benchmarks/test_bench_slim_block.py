"""One block of DeiT: dense, and slimmed from 131 to 111 of 197 tokens, in PyTorch and in C++.

The slim block is timed only after it has given the dense block's rows. The C++ rows tell the share
of the processor's measured peak that they reach (`of_peak`, in percent).
"""

import copy

import pytest
import timm
import torch

from slimvit.backends import cpu
from slimvit.models import block_parts
from slimvit.ops import FoldedBlock, pack_block, slim_block

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


@torch.inference_mode()
@pytest.mark.parametrize("alive, kept", [(TOKENS, TOKENS), (ALIVE, KEPT)], ids=["all", "slim"])
def test_cpu_slim_block(benchmark, block, alive, kept):
    module, parts = block
    dtype = parts.norm1.weight.dtype
    reason = cpu.why_not("cpu", dtype)
    if reason:
        pytest.skip(reason)
    mlp = copy.deepcopy(parts.mlp)
    parts = parts._replace(mlp=torch.nn.Sequential(mlp.fc1, mlp.act, mlp.fc2))
    pack = pack_block(FoldedBlock(parts), dtype=dtype)
    x = tokens(module, alive).float()
    wanted = slim_block(x.to(dtype), parts, kept).float()
    got = torch.ops.slimvit.slim_block(x, pack, kept)
    assert (got - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
    benchmark(torch.ops.slimvit.slim_block, x, pack, kept)
    macs = kept * 10 * x.shape[2] ** 2 + alive * 2 * x.shape[2] ** 2 + 2 * kept * alive * x.shape[2]
    if benchmark.stats is None:  # by --benchmark-disable
        return
    rate = 2 * macs * BATCH / benchmark.stats.stats.median
    peak = torch.get_num_threads() * cpu.peak(dtype)
    benchmark.extra_info["of_peak"] = round(100 * rate / peak, 1)
