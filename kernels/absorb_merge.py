"""Which tokens are kept, which of them the others go into, and what the kept ones become.

    x'_k = mean of the x_i that go into k, weighted by importance;   size'_k = Σ size_i
    spread'_k = mean of spread_i + var(x_i), weighted alike, - var(x'_k)

var is over the channels: a spread is the mean squared deviation, per channel, of the tokens that a
kept one stands for from their average. A kept token that nothing goes into stays exactly as it is.
Sums are in float32 and in the order of the tokens; no program writes what another does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import mean_variance, part_width, power_of_two
from .top_tokens import chosen

_LEAST: tl.constexpr = tl.constexpr(1e-20)  # importance: an average needs a weight


@triton.jit(do_not_specialize=["m", "n", "prefix"])
def _absorb_select(
    score,
    cosine,
    index,
    into,
    m,
    n,
    prefix,
    M_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    j = tl.arange(0, M_PADDED)
    scores = tl.load(score + image * m + j, mask=j < m, other=0.0)
    kept, position = chosen(scores, m, n, prefix)  # the same in every program of the image
    if tl.program_id(0) == 0:
        tl.store(index + image * n + position, j.to(tl.int64), mask=kept)

    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < m
    own = j[None, :] == row[:, None]
    stays = tl.max((own & kept[None, :]).to(tl.int32), axis=1) > 0
    eligible = (kept & (j >= prefix))[None, :] & (live & (stays == 0))[:, None]
    at = cosine + (image * m + row)[:, None] * m + j[None, :]
    value = tl.load(at, mask=eligible, other=float("-inf"))
    value = tl.where(value != value, float("-inf"), value)
    greatest = tl.max(value, axis=1)
    nearest = eligible & (value == greatest[:, None])
    first = tl.min(tl.where(nearest, j[None, :], M_PADDED), axis=1)
    target = tl.where(stays, row, first)
    where = tl.sum(tl.where(j[None, :] == target[:, None], position[None, :], 0), axis=1)
    tl.store(into + image * m + row, where, mask=live)


def absorb_select(score: Tensor, cosine: Tensor, n: int, prefix: int) -> tuple[Tensor, Tensor]:
    """The first `prefix` tokens and those of the highest scores, and where the others go.

    Args:
        score: [B, m], float32.
        cosine: [B, m, m], float32.
        n: tokens to keep, prefix < n ≤ m.
        prefix: leading tokens that are always kept, and that none goes into.

    Returns:
        Positions of the kept, [B, n], int64, ascending; and for each token which of the n it goes
        into, [B, m], int32: kept ones into themselves, others into the kept one of the greatest
        cosine. Among equals the earlier; NaN counts as the lowest.
    """
    batch, m = score.shape
    index = torch.empty(batch, n, dtype=torch.int64, device=score.device)
    into = torch.empty(batch, m, dtype=torch.int32, device=score.device)
    padded = max(16, power_of_two(m))
    block = max(1, min(16, 8192 // padded))
    _absorb_select[(triton.cdiv(m, block), batch)](
        *(score, cosine, index, into, m, n, prefix),
        M_PADDED=padded,
        BLOCK_M=block,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return index, into


@triton.jit
def _next(goes, source, last, k, m):
    """The first token after `last` that goes into each kept one and is not it; m for none."""
    j = tl.arange(0, goes.shape[0])
    mine = goes[None, :] == k[:, None]
    mine = mine & (j[None, :] != source[:, None]) & (j[None, :] > last[:, None])
    return tl.min(tl.where(mine, j[None, :], m), axis=1)


@triton.jit(do_not_specialize=["m", "n"])
def _absorb_merge(
    x,
    stats,
    importance,
    index,
    into,
    size,
    spread,
    out,
    out_stats,
    out_size,
    out_bias,
    out_spread,
    m,
    n,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    PART: tl.constexpr,
    SIZED: tl.constexpr,
    SPREAD: tl.constexpr,
    M_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    j = tl.arange(0, M_PADDED)
    d = tl.arange(0, WIDE)
    inside = (d < D)[None, :]
    parts: tl.constexpr = D // PART
    padded: tl.constexpr = WIDE // PART
    goes = tl.load(into + image * m + j, mask=j < m, other=-1)
    k = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = k < n
    source = tl.load(index + image * n + tl.minimum(k, n - 1)).to(tl.int32)
    importance += image * m
    x += image * m * D
    stats += image * m * (2 * parts)
    own = tl.load(x + source[:, None] * D + d[None, :], mask=inside, other=0.0)
    total = tl.maximum(tl.load(importance + source), _LEAST)
    acc = total[:, None] * own.to(tl.float32)
    _, variance = mean_variance(stats, source, D, parts, padded)  # spread included
    moment = total * variance
    sizes = tl.full((BLOCK_M,), 1.0, tl.float32)
    if SIZED:
        sizes = tl.load(size + image * m + source)
    token = _next(goes, source, tl.full((BLOCK_M,), -1, tl.int32), k, m)
    alone = token == m
    while tl.min(token, axis=0) < m:
        there = token < m
        mask = there[:, None] & inside
        row = tl.load(x + token[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        weight = tl.maximum(tl.load(importance + token, mask=there, other=0.0), _LEAST)
        weight = tl.where(there, weight, 0.0)
        total += weight
        acc += weight[:, None] * row
        _, variance = mean_variance(stats, tl.minimum(token, m - 1), D, parts, padded)
        moment += tl.where(there, weight * variance, 0.0)
        adds = tl.where(there, 1.0, 0.0)
        if SIZED:
            adds = tl.load(size + image * m + token, mask=there, other=0.0)
        sizes += adds
        token = _next(goes, source, token, k, m)
    value = tl.where(alone[:, None], own, (acc / total[:, None]).to(own.dtype))

    to = image * n + k
    tl.store(out + to[:, None] * D + d[None, :], value, mask=live[:, None] & inside)
    tl.store(out_size + to, sizes, mask=live)
    tl.store(out_bias + to, tl.log(sizes), mask=live)

    # Statistics of the row as rounded, its spread in those of the first part.
    part = tl.arange(0, padded)
    held = (part < parts)[None, :]
    value = tl.reshape(value.to(tl.float32), (BLOCK_M, padded, PART))
    means = tl.sum(value, axis=2) / PART
    apart = value - means[:, :, None]
    squares = tl.sum(apart * apart, axis=2)
    apart = tl.where(held, means - (tl.sum(means, axis=1) / parts)[:, None], 0.0)
    variance = tl.sum(squares + PART * apart * apart, axis=1) / D
    before = tl.zeros((BLOCK_M,), tl.float32)
    if SPREAD:
        before = tl.load(spread + image * m + source)
    after = tl.where(alone, before, tl.maximum(moment / total - variance, 0.0))
    tl.store(out_spread + to, after, mask=live)
    squares += tl.where(part[None, :] == 0, D * after[:, None], 0.0)
    at = stats + source[:, None] * (2 * parts) + 2 * part[None, :]
    means = tl.where(alone[:, None], tl.load(at, mask=held, other=0.0), means)
    squares = tl.where(alone[:, None], tl.load(at + 1, mask=held, other=0.0), squares)
    at = out_stats + to[:, None] * (2 * parts) + 2 * part[None, :]
    mask = live[:, None] & held
    tl.store(at, means, mask=mask)
    tl.store(at + 1, squares, mask=mask)


def absorb_merge(
    x: Tensor,
    stats: Tensor,
    importance: Tensor,
    index: Tensor,
    into: Tensor,
    *,
    size: Tensor | None = None,
    spread: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kept tokens, each averaged with those that go into it.

    Args:
        x: alive tokens, [B, m, D].
        stats: their statistics, [B, m, parts, 2], float32, which include their spread: width times
            it is in the squared deviations of the first part.
        importance: [B, m], float32.
        index: positions of the kept, [B, n], int64.
        into: which of the n each token goes into, [B, m], int32; see `absorb_select`.
        size: how many tokens each stands for, [B, m], float32; None for one each.
        spread: of those, [B, m], float32; None for none.

    Returns:
        The merged tokens [B, n, D], their statistics [B, n, parts, 2], which include their spread,
        their sizes [B, n], the log of those and their spread, float32.
    """
    (batch, m, width), n = x.shape, index.shape[1]
    out = x.new_empty(batch, n, width)
    part = part_width(width)
    out_stats = x.new_empty(batch, n, width // part, 2, dtype=torch.float32)
    sizes = [x.new_empty(batch, n, dtype=torch.float32) for _ in range(3)]
    padded, wide = max(16, power_of_two(m)), power_of_two(width)
    block = max(1, min(16, 4096 // max(padded, wide)))
    _absorb_merge[(triton.cdiv(n, block), batch)](
        *(x, stats, importance, index, into, size, spread, out, out_stats, *sizes, m, n),
        D=width,
        WIDE=wide,
        PART=part,
        SIZED=size is not None,
        SPREAD=spread is not None,
        M_PADDED=padded,
        BLOCK_M=block,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out, out_stats, *sizes
