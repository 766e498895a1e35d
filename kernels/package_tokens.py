"""Which patches a selector keeps, and the tokens after it: the others go into one package.

    score_i = Σ_h w_i^h verdict_i^h / Σ_h w_i^h,  w_i = sigmoid(weight_i)
    package = Σ_pruned P_i x_i / Σ_pruned P_i,  P_i = sigmoid(score_i)

No program writes what another does, and sums are in the order of the tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import part_width, power_of_two
from .top_tokens import chosen


@triton.jit
def _score(verdict, weight, i, p, HEADS: tl.constexpr):
    """Scores of patches i, the weighted means of the heads' verdicts."""
    i = tl.minimum(i, p - 1)
    score = tl.zeros((i.shape[0],), tl.float32)
    total = tl.zeros((i.shape[0],), tl.float32)
    top = tl.full((i.shape[0],), float("-inf"), tl.float32)
    for head in range(HEADS):
        top = tl.maximum(top, tl.load(weight + head * p + i))
    for head in range(HEADS):
        w = tl.exp(_chance(tl.load(weight + head * p + i)) - _chance(top))
        score += w * tl.load(verdict + head * p + i)
        total += w
    return score / total


@triton.jit
def _chance(score):
    """The log of sigmoid(score), which may be too small to hold."""
    return tl.minimum(score, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(score)))


@triton.jit
def _shares(score, pruned):
    """Of each pruned patch in the package."""
    chance = tl.where(pruned, _chance(score), float("-inf"))
    share = tl.exp(chance - tl.max(chance, axis=0))
    share = tl.where(pruned, share, 0.0)
    return share / tl.sum(share, axis=0)


@triton.jit(do_not_specialize=["p", "n", "prefix", "packages"])
def _selector_choose(
    verdict,
    weight,
    score,
    share,
    index,
    p,
    n,
    prefix,
    packages,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    OTHERS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PADDED)
    value = _score(verdict + image * HEADS * p, weight + image * HEADS * p, i, p, HEADS)
    tl.store(score + image * p + i, value, mask=i < p)
    kept, position = chosen(value, p, n, 0)
    shares = _shares(value, (i < p) & (kept == 0))
    tl.store(share + image * p + i, shares, mask=i < p)
    index += image * (prefix + n + packages + 1)
    tl.store(index + prefix + position, (prefix + i).to(tl.int64), mask=kept)
    k = tl.arange(0, OTHERS)
    tl.store(index + k, k.to(tl.int64), mask=k < prefix)
    # The packages, the new one as if it came after them already.
    tl.store(index + prefix + n + k, (prefix + p + k).to(tl.int64), mask=k <= packages)


def selector_choose(
    verdict: Tensor, weight: Tensor, n: int, prefix: int, packages: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The n patches of the highest scores, and how much of the package each other one is.

    Args:
        verdict: of each head on each patch, [B, H, p], float32; see `selector_judge`.
        weight: the logit of how much it counts, [B, H, p], float32.
        n: patches to keep, 0 < n < p.
        prefix: tokens ahead of the patches.
        packages: tokens after them.

    Returns:
        Scores [B, p], float32; shares in the package [B, p], float32, zero for what is kept; and
        which of the tokens follow, [B, prefix + n + packages + 1], int64, ascending: the last is m,
        the new package, as if it came after the m that there are. Among equal scores the earlier
        patch is kept; NaN counts as the lowest.
    """
    batch, heads, p = verdict.shape
    score, share = (verdict.new_empty(batch, p) for _ in range(2))
    index = verdict.new_empty(batch, prefix + n + packages + 1, dtype=torch.int64)
    padded = max(16, power_of_two(p))
    _selector_choose[(batch,)](
        *(verdict, weight, score, share, index, p, n, prefix, packages),
        HEADS=heads,
        PADDED=padded,
        OTHERS=power_of_two(max(prefix, packages + 1)),
        num_warps=4 if padded <= 512 else 8,
        enable_fp_fusion=True,
    )
    return score, share, index


@triton.jit
def _store_row_stats(stats, to, live, value, D: tl.constexpr, PART: tl.constexpr):
    """Statistics of rows `value` [M, N], of whose columns the first D count."""
    parts: tl.constexpr = D // PART
    count: tl.constexpr = value.shape[1] // PART
    value = tl.reshape(value, (value.shape[0], count, PART))
    mean = tl.sum(value, axis=2) / PART
    apart = value - mean[:, :, None]
    part = tl.arange(0, count)
    at = stats + to[:, None] * (2 * parts) + 2 * part[None, :]
    mask = live[:, None] & (part < parts)[None, :]
    tl.store(at, mean, mask=mask)
    tl.store(at + 1, tl.sum(apart * apart, axis=2), mask=mask)


@triton.jit
def _write_package(
    x, share, out, stats, p, part, D: tl.constexpr, PART: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Columns of part `part` of the sum of rows of x, weighted by `share`."""
    column = part * PART + tl.arange(0, PART)
    acc = tl.zeros((1, PART), tl.float32)
    for start in range(0, p, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        weight = tl.load(share + i, mask=i < p, other=0.0)[:, None]
        # What is kept is not read: where it is infinite, zero times it would be NaN.
        at = x + i[:, None] * D + column[None, :]
        row = tl.load(at, mask=weight != 0.0, other=0.0).to(tl.float32)
        acc += tl.sum(weight * row, axis=0)[None, :]
    value = acc.to(x.dtype.element_ty)
    one = tl.arange(0, 1)
    tl.store(out + one[:, None] + column[None, :], value)
    _store_row_stats(stats + 2 * part, one, one == 0, value.to(tl.float32), PART, PART)


@triton.jit
def _write_rows(
    x, index, out, stats, k, count, D: tl.constexpr, WIDE: tl.constexpr, PART: tl.constexpr
):
    """Rows k of the first `count` of those at an index."""
    live = k < count
    source = tl.load(index + k, mask=live, other=0)
    d = tl.arange(0, WIDE)
    mask = live[:, None] & (d < D)[None, :]
    value = tl.load(x + source[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(out + k[:, None] * D + d[None, :], value, mask=mask)
    _store_row_stats(stats, k, live, value.to(tl.float32), D, PART)


@triton.jit(do_not_specialize=["m", "p", "prefix", "count"])
def _package_tokens(
    x,
    index,
    share,
    out,
    stats,
    m,
    p,
    prefix,
    count,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0)
    parts: tl.constexpr = D // PART
    last = count - 1
    x += image * m * D
    out += image * count * D
    stats += image * count * (2 * parts)
    if number < parts:
        x += prefix * D
        out += last * D
        stats += last * (2 * parts)
        _write_package(x, share + image * p, out, stats, p, number, D, PART, BLOCK_P)
    else:
        k = (number - parts) * BLOCK_M + tl.arange(0, BLOCK_M)
        _write_rows(x, index + image * count, out, stats, k, last, D, WIDE, PART)


def package_tokens(x: Tensor, index: Tensor, share: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """The tokens at an index, and after them the package: package = Σ share_i x_i.

    Args:
        x: alive tokens, [B, m, D].
        index: which follow, [B, count], int64, the last for the package; see `selector_choose`.
        share: of each patch in the package, [B, p], float32.
        prefix: tokens ahead of the patches.

    Returns:
        The tokens [B, count, D], and their statistics [B, count, parts, 2], float32.
    """
    (batch, m, width), count, p = x.shape, index.shape[1], share.shape[1]
    out, part = x.new_empty(batch, count, width), part_width(width)
    stats = x.new_empty(batch, count, width // part, 2, dtype=torch.float32)
    wide = power_of_two(width)
    block = max(1, min(16, 4096 // wide))
    _package_tokens[(width // part + triton.cdiv(count - 1, block), batch)](
        *(x, index, share, out, stats, m, p, prefix, count),
        D=width,
        WIDE=wide,
        PART=part,
        BLOCK_M=block,
        BLOCK_P=64,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out, stats
