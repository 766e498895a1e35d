"""How each head of a selector judges each patch, by its own channels x_i^h of it.

    local_i, other_i = the halves of GELU(LN(x_i^h) E + e)
    verdict_i        = GELU(GELU([local_i, mean_j other_j] J1 + b1) J2 + b2) · j3 + b3
    weight_i         = (W2 GELU(W1 (mean of each head's channels of x_i) + c1) + c2)_h

Two launches, a program for a tile of patches, a head and an image: the mean is over all patches, so
it comes between them. Its sums are taken tile by tile, in order: an image's verdicts are the same
to the bit in every batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import activate, power_of_two

_BLOCK = 32  # patches of a tile


@triton.jit
def _matrix(at, rows, columns, ROWS, COLUMNS, STRIDE):
    """A matrix of ROWS x COLUMNS, in its corner of a larger one that is zero elsewhere."""
    inside = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(at + rows[:, None] * STRIDE + columns[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["m", "p", "prefix"])
def _selector_embed(
    x,
    embed,
    bias,
    local,
    sums,
    means,
    m,
    p,
    prefix,
    eps,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    LOCAL: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    patch = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = patch < p
    c = tl.arange(0, WIDE)
    inside = (c < C)[None, :]
    row = image * m + prefix + tl.minimum(patch, p - 1)
    at = x + row * (HEADS * C) + head * C
    value = tl.load(at[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, axis=1) / C
    apart = tl.where(inside, value - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(apart * apart, axis=1) / C + eps)

    of_head = image * HEADS + head
    tl.store(means + of_head * p + patch, mean, mask=live)
    embed += head * C * C
    y = tl.zeros((BLOCK_M, WIDE), tl.float32)
    for start in range(0, C, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        part = tl.load(at[:, None] + k[None, :], mask=(k < C)[None, :], other=0.0).to(tl.float32)
        normed = ((part - mean[:, None]) * rstd[:, None]).to(x.dtype.element_ty)
        y = tl.dot(normed, _matrix(embed, k, c, C, C, C), y, input_precision=PRECISION)
    y = activate(y + tl.load(bias + head * C + c, mask=c < C, other=0.0)[None, :], "gelu", EXACT)
    to = local + (of_head * p + patch)[:, None] * LOCAL + c[None, :]
    tl.store(to, y.to(local.dtype.element_ty), mask=live[:, None] & (c < LOCAL)[None, :])
    total = tl.sum(tl.where(live[:, None], y, 0.0), axis=0)
    to = sums + (of_head * tl.num_programs(0) + tile) * (C - LOCAL) + c - LOCAL
    tl.store(to, total, mask=(c >= LOCAL) & (c < C))


@triton.jit
def _of_mean(sums, judge1, p, tiles, SHARED, HALF, WIDE: tl.constexpr, HALF_PADDED: tl.constexpr):
    """What the mean over the patches adds to each patch's first judgement, [HALF_PADDED]."""
    s = tl.arange(0, WIDE)
    total = tl.zeros((WIDE,), tl.float32)
    for tile in range(tiles):
        total += tl.load(sums + tile * SHARED + s, mask=s < SHARED, other=0.0)
    weight = _matrix(judge1, s, tl.arange(0, HALF_PADDED), SHARED, HALF, HALF).to(tl.float32)
    return tl.sum((total / p)[:, None] * weight, axis=0)


@triton.jit
def _weight(
    means,
    weigh1,
    bias1,
    weigh2,
    bias2,
    patch,
    p,
    HEADS: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_PADDED: tl.constexpr,
):
    """How much the head counts, a logit, of whose row `weigh2` and `bias2` are, at some patches."""
    j = tl.arange(0, HIDDEN_PADDED)
    inside = j < HIDDEN
    hidden = tl.zeros((patch.shape[0], HIDDEN_PADDED), tl.float32)
    hidden += tl.load(bias1 + j, mask=inside, other=0.0)[None, :]
    for head in range(HEADS):
        mean = tl.load(means + head * p + patch, mask=patch < p, other=0.0)
        hidden += (
            mean[:, None] * tl.load(weigh1 + j * HEADS + head, mask=inside, other=0.0)[None, :]
        )
    last = tl.load(weigh2 + j, mask=inside, other=0.0)
    y = tl.sum(activate(hidden, "gelu", True) * last[None, :], axis=1)
    return y + tl.load(bias2)


@triton.jit(do_not_specialize=["p", "tiles"])
def _selector_judge(
    local,
    sums,
    means,
    judge1,
    bias1,
    judge2,
    bias2,
    judge3,
    bias3,
    weigh1,
    weigh1_bias,
    weigh2,
    weigh2_bias,
    verdict,
    weights,
    p,
    tiles,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    LOCAL: tl.constexpr,
    HALF: tl.constexpr,
    QUARTER: tl.constexpr,
    HIDDEN: tl.constexpr,
    LOCAL_PADDED: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    QUARTER_PADDED: tl.constexpr,
    HIDDEN_PADDED: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    of_head = image * HEADS + head
    patch = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c, j, k = tl.arange(0, LOCAL_PADDED), tl.arange(0, HALF_PADDED), tl.arange(0, QUARTER_PADDED)
    judge1 += head * C * HALF
    judge2 += head * HALF * QUARTER
    shared: tl.constexpr = C - LOCAL
    first = tl.load(bias1 + head * HALF + j, mask=j < HALF, other=0.0)
    sums += of_head * tiles * shared
    others = judge1 + LOCAL * HALF
    first += _of_mean(sums, others, p, tiles, shared, HALF, LOCAL_PADDED, HALF_PADDED)
    y = _matrix(local + of_head * p * LOCAL, tl.minimum(patch, p - 1), c, p, LOCAL, LOCAL)
    weight = _matrix(judge1, c, j, LOCAL, HALF, HALF)
    y = tl.dot(y, weight, input_precision=PRECISION) + first[None, :]
    y = activate(y, "gelu", EXACT).to(local.dtype.element_ty)
    weight = _matrix(judge2, j, k, HALF, QUARTER, QUARTER)
    y = tl.dot(y, weight, input_precision=PRECISION)
    y += tl.load(bias2 + head * QUARTER + k, mask=k < QUARTER, other=0.0)[None, :]
    y = activate(y, "gelu", EXACT)
    last = tl.load(judge3 + head * QUARTER + k, mask=k < QUARTER, other=0.0)
    value = tl.sum(y * last[None, :], axis=1) + tl.load(bias3 + head)
    tl.store(verdict + of_head * p + patch, value, mask=patch < p)

    means += image * HEADS * p
    weigh2 += head * HIDDEN
    weigh2_bias += head
    value = _weight(  # of the head
        means, weigh1, weigh1_bias, weigh2, weigh2_bias, patch, p, HEADS, HIDDEN, HIDDEN_PADDED
    )
    tl.store(weights + of_head * p + patch, value, mask=patch < p)


def selector_judge(
    x: Tensor,
    embed: Tensor,
    embed_bias: Tensor,
    judge1: Tensor,
    bias1: Tensor,
    judge2: Tensor,
    bias2: Tensor,
    judge3: Tensor,
    bias3: Tensor,
    weigh1: Tensor,
    weigh1_bias: Tensor,
    weigh2: Tensor,
    weigh2_bias: Tensor,
    prefix: int,
    packages: int,
    *,
    eps: float,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """What each head says of each patch, and how much it counts there.

    Args:
        x: alive tokens: prefix, p patches, packages: [B, m, H·c], c at most 128.
        embed: the embedding with the norm's weight in it, [H, c, c], inputs before outputs; its
            first (c + 1) // 2 outputs are local.
        embed_bias: with the norm's bias in it, [H, c], float32.
        judge1: [H, c, c2], its first rows for what is local.
        bias1: [H, c2], float32.
        judge2: [H, c2, c4].
        bias2: [H, c4], float32.
        judge3: [H, c4], float32.
        bias3: [H], float32.
        weigh1: [r, H], float32.
        weigh1_bias: [r], float32.
        weigh2: [H, r], float32.
        weigh2_bias: [H], float32.
        prefix: leading tokens that are no patches.
        packages: tokens at the end that are none.
        eps: of the norm.
        precision: of float32 products, "ieee" or "tf32".

    Returns:
        Verdicts, and logits of weights, [B, H, p], float32.
    """
    (batch, m, _), (heads, c, half) = x.shape, judge1.shape
    p, quarter, local = m - prefix - packages, judge2.shape[2], (c + 1) // 2
    tiles, exact = triton.cdiv(p, _BLOCK), x.dtype == torch.float32
    kept = x.new_empty(batch, heads, p, local)
    sums = x.new_empty(batch, heads, tiles, c - local, dtype=torch.float32)
    means = x.new_empty(batch, heads, p, dtype=torch.float32)
    verdict, weight = torch.empty_like(means), torch.empty_like(means)
    same = {
        "HEADS": heads,
        "C": c,
        "LOCAL": local,
        "EXACT": exact,
        "PRECISION": precision,
        "BLOCK_M": _BLOCK,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
    _selector_embed[(tiles, heads, batch)](
        *(x, embed, embed_bias, kept, sums, means, m, p, prefix, eps),
        WIDE=_padded(c),
        BLOCK_K=min(_padded(c), 128 // x.element_size()),
        **same,
    )
    _selector_judge[(tiles, heads, batch)](
        *(kept, sums, means, judge1, bias1, judge2, bias2, judge3, bias3),
        *(weigh1, weigh1_bias, weigh2, weigh2_bias, verdict, weight, p, tiles),
        HALF=half,
        QUARTER=quarter,
        HIDDEN=weigh1.shape[0],
        LOCAL_PADDED=_padded(local),
        HALF_PADDED=_padded(half),
        QUARTER_PADDED=_padded(quarter),
        HIDDEN_PADDED=power_of_two(weigh1.shape[0]),
        **same,
    )
    return verdict, weight


def _padded(channels: int) -> int:
    return max(16, power_of_two(channels))  # the least that a matrix instruction takes
