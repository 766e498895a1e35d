"""The fused block against slim_block in float64: it errs at most twice as much as PyTorch."""

import copy
import math

import pytest
import torch
from fused_blocks import Case, inputs, make, make_parts
from kernel_checks import DEVICE, DTYPES, FLOOR, Random, check, check_stats, distance, kernels
from torch import Tensor, nn

from slimvit.ops import Alive, BlockParts, Choice, dynamic_block, slim_block, zero_key

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# 112 and 288 are widths of which no program holds whole rows: projection, fc1 and fc2 are apart.
CASES = [
    Case(1, 1, 1),
    Case(1, 1, 3, width=112, zero_rows=5, act="quick_gelu"),
    Case(17, 5, 3, index=True, key_bias="Bm"),
    Case(37, 21, 1, width=112, index=True, key_bias="m", act="gelu_tanh"),
    Case(63, 40, 1, width=192, heads=1, head_dim=64, hidden=192, zero_rows=134),
    Case(33, 33, 1, width=288, heads=1, head_dim=80, hidden=48, biases=False),
    Case(17, 5, idle=True, act="quick_gelu"),
    Case(17, 16, width=112, idle=True, key_bias="Bm", norm_bias=False),
    Case(17, 17, idle=True),
    Case(7, 3, 3, width=112, biases=False, norm_bias=False, zero_rows=1, key_bias="m"),
    Case(7, 2, 3, index=True, zero_rows=9, key_bias="Bm", norm_bias=False),
    Case(1, 1, 1, last=True),
    Case(17, 1, 3, index=True, key_bias="Bm", last=True),
    Case(37, 2, 1, width=112, heads=2, head_dim=80, zero_rows=9, last=True, act="gelu_tanh"),
    Case(63, 1, 1, width=192, heads=2, head_dim=64, key_bias="m", biases=False, last=True),
    Case(17, 2, 2, idle=True, norm_bias=False, last=True),
    Case(7, 2, 3, index=True, zero_rows=9, key_bias="m", norm_bias=False, last=True),
]


# Of tokens that stand for several.
SEVERAL = [
    Case(1, 1, 1),
    Case(17, 5, 3, index=True, act="quick_gelu"),
    Case(37, 21, 1, width=112, act="gelu_tanh"),
    Case(19, 19, 2, width=112, biases=False, norm_bias=False),
    Case(63, 40, 1, width=192, heads=1, head_dim=64, hidden=192, index=True),
    Case(17, 1, 3, index=True, last=True),
    Case(37, 2, 1, width=112, heads=2, head_dim=80, last=True, act="gelu_tanh"),
]


def of_dtype(parts: BlockParts, dtype: torch.dtype) -> BlockParts:
    modules = {
        name: copy.deepcopy(part).to(dtype)
        for name, part in parts._asdict().items()
        if isinstance(part, nn.Module)
    }
    return parts._replace(**modules)


def reference(
    case: Case, parts: BlockParts, keep: int | Tensor, x: Tensor, key_bias: Tensor | None
) -> Tensor:
    """Of slim_block, in the dtype of `x`."""
    parts = of_dtype(parts, x.dtype)
    extra = zero_key(parts, case.zero_rows, x) if case.zero_rows else None
    y = slim_block(x.transpose(0, 1), parts, keep, key_bias=key_bias, extra_key=extra)
    y = y.transpose(0, 1)
    return torch.cat([y, x[:, case.n :]], 1) if case.idle else y


@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errs_no_more_than_torch(poison_empty, dtype, case):
    block, parts = make(case, dtype), make_parts(case, dtype)
    x, keep, key_bias = inputs(case, dtype)
    before = x.clone()
    got, stats = block(x, keep, key_bias=key_bias, idle=case.idle)
    assert got.dtype == dtype
    assert torch.equal(x, before)
    check(got, lambda *given: reference(case, parts, keep, *given), x, key_bias)
    check_stats(stats, got)
    assert bool(block.keys.numel()) == case.last


def several(case: Case) -> tuple[Tensor, Tensor]:
    """Sizes and spreads of tokens of which every third stands for itself."""
    random, shape = Random(case.m + 1), (case.batch, case.m)
    size, spread = 2 + (3 * random(*shape).abs()).round(), random(*shape).square()
    size[:, 1::3], spread[:, 1::3] = 1, 0
    return size, spread


def check_several(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Of any back end, against `dynamic_block`."""
    block, parts = make(case, dtype, backend=backend), make_parts(case, dtype)
    (x, keep, _), (size, spread) = inputs(case, dtype), several(case)

    def formula(x: Tensor) -> Tensor:
        place = torch.arange(case.m, device=x.device).expand(case.batch, -1)
        alive = Alive(x.transpose(0, 1), place, size, spread=spread)
        prefix = 0 if case.index else case.n
        kept = dynamic_block(
            alive, of_dtype(parts, x.dtype), case.n, lambda view, n: Choice(keep), prefix=prefix
        )
        return kept.x.transpose(0, 1)

    got, stats = block(x, keep, key_bias=size.log(), spread=spread)
    check(got, formula, x)
    check_stats(stats, got, spread.gather(1, keep) if case.index else spread[:, : case.n])


@dtypes
@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_of_tokens_that_stand_for_several(poison_empty, dtype, case):
    check_several(case, dtype, "triton")


@dtypes
@pytest.mark.parametrize("width", [48, 112])
def test_the_spread_is_in_the_statistics_given(dtype, width):
    case = Case(17, 9, width=width)
    block, (x, _, _), (_, spread) = make(case, dtype), inputs(case, dtype), several(case)
    wanted, wanted_stats = block(x, 9, spread=spread)
    stats = kernels.row_stats(x)
    stats[:, :, 0, 1] += width * spread
    got, got_stats = block(x, 9, stats, spread=spread)
    assert torch.equal(got, wanted)
    assert torch.equal(got_stats, wanted_stats)
    none, _ = block(x, 9, spread=torch.zeros(2, 17, device=DEVICE))
    without, _ = block(x, 9)
    assert distance(none, without.double()) <= FLOOR[dtype]
    assert distance(got, without.double()) > 0.01


@dtypes
def test_the_statistics_before_are_used(dtype):
    """Those that an op gives with its tokens serve the next one."""
    case = Case(17, 9)
    block, (x, _, _) = make(case, dtype), inputs(case, dtype)
    x, stats = block(x, 9)
    wanted, _ = block(x, 5)
    got, _ = block(x, 5, stats)
    assert distance(got, wanted.double()) <= FLOOR[dtype]
    off, _ = block(x, 5, 2 * stats)
    assert not torch.allclose(off, wanted, atol=0.1)


@dtypes
@pytest.mark.parametrize("n", [1, 2])
def test_the_last_block_is_a_block(dtype, n):
    """Without keys and values of the others: the same answer."""
    case = Case(17, n, index=True, key_bias="Bm", zero_rows=4)
    x, index, key_bias = inputs(case, dtype)
    whole, last = make(case, dtype), make(case, dtype, last=True)
    wanted, _ = whole(x, index, key_bias=key_bias)
    got, _ = last(x, index, key_bias=key_bias)
    limit = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert not torch.equal(last.keys, whole.keys)
    assert distance(got, wanted.double()) < limit


def test_tf32_is_near():
    case = Case(17, 9)
    x, keep, _ = inputs(case, torch.float32)
    wanted, _ = make(case)(x, keep)
    got, _ = make(case, tf32=True)(x, keep)
    assert (got - wanted).norm() < 2e-3 * wanted.norm()


@dtypes
@pytest.mark.parametrize("last", [False, True])
def test_any_strides(dtype, last):
    """What is not contiguous: the same bits."""
    case = Case(17, 2, 3, index=True, key_bias="Bm", last=last)
    block, (x, index, key_bias) = make(case, dtype), inputs(case, dtype)
    wanted, _ = block(x, index, key_bias=key_bias)
    tokens_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    for view in (tokens_first, x.repeat_interleave(2, 2)[..., ::2]):
        assert not view.is_contiguous()
        assert torch.equal(block(view, index, key_bias=key_bias)[0], wanted)
    index, key_bias = index.t().contiguous().t(), key_bias.double().t().contiguous().t()
    assert torch.equal(block(x, index, key_bias=key_bias)[0], wanted)


@dtypes
@pytest.mark.parametrize("width", [48, 112])
@pytest.mark.parametrize("last", [False, True])
def test_nan_stays_in_its_image(dtype, width, last):
    case = Case(17, 2, 3, width=width, last=last)
    block, (x, _, _) = make(case, dtype), inputs(case, dtype)
    wanted, _ = block(x, 2)
    x[1, 16, 7] = math.nan
    got, _ = block(x, 2)
    assert got[1].isnan().all()
    assert torch.equal(got[::2], wanted[::2])
