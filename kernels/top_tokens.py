"""The highest scores of each image, without sorting: a threshold, found bit by bit.

Floats are compared as integers of the same order. The n-th greatest is built from its highest bit
down, each bit kept if n scores reach that far, so the work grows with m and not with m².
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import power_of_two

_LOWEST: tl.constexpr = tl.constexpr(-(2**31))


@triton.jit
def chosen(scores, m, n, prefix):
    """Which of m scores are kept, and where each of those comes among the kept.

    The first `prefix` and the highest of the others, n in all; among equals the earlier, NaN as the
    lowest. `scores` is a vector whose first m values count.
    """
    j = tl.arange(0, scores.shape[0])
    scores = tl.where(scores != scores, float("-inf"), scores)
    scores = tl.where(j < prefix, float("inf"), scores)
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)  # one zero, not two
    key = tl.where(j < m, bits ^ ((bits >> 31) & 0x7FFFFFFF), _LOWEST)  # no float has this key
    least = tl.where(tl.sum((key >= 0).to(tl.int32), axis=0) >= n, 0, _LOWEST)
    for bit in range(31):
        candidate = least + (1 << (30 - bit))
        enough = tl.sum((key >= candidate).to(tl.int32), axis=0) >= n
        least = tl.where(enough, candidate, least)
    above = key > least
    equal = (key == least).to(tl.int32)
    room = n - tl.sum(above.to(tl.int32), axis=0)
    kept = above | ((equal > 0) & (tl.cumsum(equal, axis=0) <= room))
    return kept, tl.cumsum(kept.to(tl.int32), axis=0) - 1


@triton.jit(do_not_specialize=["m", "n", "prefix"])
def _top_tokens(
    scores,
    weight,
    index,
    m,
    n,
    prefix,
    CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    M_PADDED: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, M_PADDED)
    if CHANNELS > 0:
        value = tl.zeros((M_PADDED,), tl.float32)
        row = image * m + tl.minimum(j, m - 1)
        k = tl.arange(0, BLOCK_K)
        for start in range(0, CHANNELS, BLOCK_K):
            hidden = tl.load(scores + row[:, None] * CHANNELS + start + k[None, :])
            w = tl.load(weight + start + k)
            value += tl.sum(hidden.to(tl.float32) * w[None, :], axis=1)
    else:
        value = tl.load(scores + image * m + j, mask=j < m, other=0.0)
    kept, position = chosen(value, m, n, prefix)
    tl.store(index + image * n + position, j.to(tl.int64), mask=kept)


def top_tokens(scores: Tensor, n: int, prefix: int, *, weight: Tensor | None = None) -> Tensor:
    """Positions of the first `prefix` tokens and of the highest scores among the others.

    Args:
        scores: [B, m], float32; or, with `weight`, what predicts them, [B, m, r].
        n: tokens to keep, prefix tokens included, at most m.
        prefix: leading tokens that are always kept.
        weight: [r], float32, r a multiple of 16: the scores are scores · weight.

    Returns:
        [B, n], int64, ascending. Among equal scores the earlier is kept; NaN counts as the lowest.
    """
    batch, m = scores.shape[:2]
    index = torch.empty(batch, n, dtype=torch.int64, device=scores.device)
    padded = max(16, power_of_two(m))
    _top_tokens[(batch,)](
        *(scores, weight, index, m, n, prefix),
        CHANNELS=0 if weight is None else weight.shape[0],
        BLOCK_K=max(4, min(16, 8192 // padded)),
        M_PADDED=padded,
        num_warps=4 if padded <= 512 else 8,
        enable_fp_fusion=True,
    )
    return index
