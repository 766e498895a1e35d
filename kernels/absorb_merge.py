"""Which tokens are kept, which of them the others go into, and what the kept ones become.

    x'_k = mean of the x_i that go into k, weighted by importance, with the mean of their lengths
           for a length;   size'_k = size_k + Σ size_i · sqrt(cosine_ik)

A kept token that nothing goes into stays exactly as it is. Sums are in float32 and in the order of
the tokens; no program writes what another does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import part_width, power_of_two
from .top_tokens import chosen

_LEAST: tl.constexpr = tl.constexpr(1e-20)  # importance: an average needs a weight
_TINY: tl.constexpr = tl.constexpr(1e-12)


@triton.jit(do_not_specialize=["m", "n", "prefix"])
def _absorb_select(
    score,
    cosine,
    size,
    index,
    into,
    gain,
    m,
    n,
    prefix,
    SIZED: tl.constexpr,
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
    adds = tl.where(stays, 1.0, tl.sqrt(tl.maximum(greatest, 0.0)))
    if SIZED:
        adds *= tl.load(size + image * m + row, mask=live, other=0.0)
    tl.store(gain + image * m + row, adds, mask=live)


def absorb_select(
    score: Tensor, cosine: Tensor, n: int, prefix: int, *, size: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The first `prefix` tokens and those of the highest scores, and where the others go.

    Args:
        score: [B, m], float32.
        cosine: [B, m, m], float32.
        n: tokens to keep, prefix < n ≤ m.
        prefix: leading tokens that are always kept, and that none goes into.
        size: how many tokens each stands for, [B, m], float32; None for one each.

    Returns:
        Positions of the kept, [B, n], int64, ascending; for each token which of the n it goes
        into, [B, m], int32: kept ones into themselves, others into the kept one of the greatest
        cosine; and what it adds to that one's size, [B, m], float32. Among equals the earlier; NaN
        counts as the lowest.
    """
    batch, m = score.shape
    index = torch.empty(batch, n, dtype=torch.int64, device=score.device)
    into = torch.empty(batch, m, dtype=torch.int32, device=score.device)
    gain = torch.empty_like(score)
    padded = max(16, power_of_two(m))
    block = max(1, min(16, 8192 // padded))
    _absorb_select[(triton.cdiv(m, block), batch)](
        *(score, cosine, size, index, into, gain, m, n, prefix),
        SIZED=size is not None,
        M_PADDED=padded,
        BLOCK_M=block,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return index, into, gain


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
    importance,
    index,
    into,
    gain,
    out,
    out_stats,
    out_size,
    out_bias,
    m,
    n,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    PART: tl.constexpr,
    M_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    j = tl.arange(0, M_PADDED)
    d = tl.arange(0, WIDE)
    inside = (d < D)[None, :]
    goes = tl.load(into + image * m + j, mask=j < m, other=-1)
    k = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = k < n
    source = tl.load(index + image * n + tl.minimum(k, n - 1)).to(tl.int32)
    importance += image * m
    gain += image * m
    x += image * m * D
    own = tl.load(x + source[:, None] * D + d[None, :], mask=inside, other=0.0)
    row = own.to(tl.float32)
    weight = tl.maximum(tl.load(importance + source), _LEAST)
    total = weight
    acc = weight[:, None] * row
    lengths = weight * tl.sqrt(tl.sum(row * row, axis=1))
    sizes = tl.load(gain + source)
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
        lengths += weight * tl.sqrt(tl.sum(row * row, axis=1))
        sizes += tl.load(gain + token, mask=there, other=0.0)
        token = _next(goes, source, token, k, m)
    acc = acc / total[:, None]
    length = tl.maximum(tl.sqrt(tl.sum(acc * acc, axis=1)), _TINY)
    acc = acc * (lengths / total / length)[:, None]
    value = tl.where(alone[:, None], own, acc.to(own.dtype))

    to = image * n + k
    tl.store(out + to[:, None] * D + d[None, :], value, mask=live[:, None] & inside)
    tl.store(out_size + to, sizes, mask=live)
    tl.store(out_bias + to, tl.log(sizes), mask=live)
    parts: tl.constexpr = D // PART
    value = tl.reshape(value.to(tl.float32), (BLOCK_M, WIDE // PART, PART))
    mean = tl.sum(value, axis=2) / PART
    apart = value - mean[:, :, None]
    part = tl.arange(0, WIDE // PART)
    at = out_stats + to[:, None] * (2 * parts) + 2 * part[None, :]
    mask = live[:, None] & (part < parts)[None, :]
    tl.store(at, mean, mask=mask)
    tl.store(at + 1, tl.sum(apart * apart, axis=2), mask=mask)


def absorb_merge(
    x: Tensor, importance: Tensor, index: Tensor, into: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kept tokens, each averaged with those that go into it.

    Args:
        x: alive tokens, [B, m, D].
        importance: [B, m], float32.
        index: positions of the kept, [B, n], int64.
        into: which of the n each token goes into, [B, m], int32; see `absorb_select`.
        gain: what each token adds to that one's size, [B, m], float32.

    Returns:
        The merged tokens [B, n, D], their statistics [B, n, parts, 2], their sizes [B, n] and the
        log of those, float32.
    """
    (batch, m, width), n = x.shape, index.shape[1]
    out = x.new_empty(batch, n, width)
    part = part_width(width)
    stats = x.new_empty(batch, n, width // part, 2, dtype=torch.float32)
    sizes, bias = (x.new_empty(batch, n, dtype=torch.float32) for _ in range(2))
    padded, wide = max(16, power_of_two(m)), power_of_two(width)
    block = max(1, min(16, 4096 // max(padded, wide)))
    _absorb_merge[(triton.cdiv(n, block), batch)](
        *(x, importance, index, into, gain, out, stats, sizes, bias, m, n),
        D=width,
        WIDE=wide,
        PART=part,
        M_PADDED=padded,
        BLOCK_M=block,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out, stats, sizes, bias
