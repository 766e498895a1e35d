"""Attention of the one or two tokens that the head reads, in the last block: no key is projected.

    z_h = Σ_j softmax_j(u_h · ŷ_j / sqrt(d) + bias_j) ŷ_j,   u_h = W_kᵀ q_h,   ŷ = (x - mean) · rstd

q · (W_k y) = (W_kᵀ q) · y, so keys need not exist, and the value of an average is the average of
the values: of two D × D products for each alive token none is left. What the bias of the key
projection adds to a logit is the same for every key and falls out of the softmax.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import architecture, mean_rstd, power_of_two
from .configs import Config, lookup

# Queries of an image, n · H, and channels that fit a program's registers.
MOST_QUERIES, MOST_CHANNELS = 32, 1024
_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _normalised(x, row, mean, rstd, first, D: tl.constexpr, PIECE: tl.constexpr):
    """Channels `first` … `first + PIECE` of normalised rows, in the dtype of `x`."""
    d = first + tl.arange(0, PIECE)
    y = tl.load(x + row[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    y = (y.to(tl.float32) - mean[:, None]) * rstd[:, None]
    return tl.where((d < D)[None, :], y, 0.0).to(x.dtype.element_ty)


@triton.jit
def _load_piece(at, live, first, D: tl.constexpr, PIECE: tl.constexpr):
    d = first + tl.arange(0, PIECE)
    return tl.load(at[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store_piece(at, live, first, value, D: tl.constexpr):
    d = first + tl.arange(0, value.shape[1])
    tl.store(at[:, None] + d[None, :], value, mask=live[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["m", "x_rows", "bias_image", "queries"])
def _last_attention(
    x,
    stats,
    u,
    bias,
    out,
    m,
    x_rows,
    bias_image,
    queries,
    scale,
    eps,
    extra_bias,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    BIAS: tl.constexpr,
    EXTRA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    dtype = x.dtype.element_ty
    scale *= _LOG2E
    bias += image * bias_image
    query = tl.arange(0, BLOCK_M)
    live = query < queries
    at = (image * queries + query) * D
    u0 = _load_piece(u + at, live, 0, D, PIECE)
    acc0 = tl.zeros((BLOCK_M, PIECE), tl.float32)
    if PIECES > 1:
        u1 = _load_piece(u + at, live, PIECE, D, PIECE)
        acc1 = tl.zeros((BLOCK_M, PIECE), tl.float32)
    if PIECES > 2:
        u2 = _load_piece(u + at, live, 2 * PIECE, D, PIECE)
        acc2 = tl.zeros((BLOCK_M, PIECE), tl.float32)
    if PIECES > 3:
        u3 = _load_piece(u + at, live, 3 * PIECE, D, PIECE)
        acc3 = tl.zeros((BLOCK_M, PIECE), tl.float32)

    # Zero rows are ŷ = 0: a logit of its bias alone, and nothing for the sum.
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if EXTRA:
        top = tl.zeros((BLOCK_M,), tl.float32) + extra_bias * _LOG2E
        total += 1.0
    for start in range(0, m, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        row = image * x_rows + tl.minimum(key, m - 1)
        mean, rstd = mean_rstd(stats, row, eps, D, PARTS, PARTS_PADDED)
        y0 = _normalised(x, row, mean, rstd, 0, D, PIECE)
        s = tl.dot(u0, tl.trans(y0), input_precision=PRECISION)
        if PIECES > 1:
            y1 = _normalised(x, row, mean, rstd, PIECE, D, PIECE)
            s = tl.dot(u1, tl.trans(y1), s, input_precision=PRECISION)
        if PIECES > 2:
            y2 = _normalised(x, row, mean, rstd, 2 * PIECE, D, PIECE)
            s = tl.dot(u2, tl.trans(y2), s, input_precision=PRECISION)
        if PIECES > 3:
            y3 = _normalised(x, row, mean, rstd, 3 * PIECE, D, PIECE)
            s = tl.dot(u3, tl.trans(y3), s, input_precision=PRECISION)
        s *= scale
        if BIAS:
            s += (tl.load(bias + tl.minimum(key, m - 1)) * _LOG2E)[None, :]
        s = tl.where((key < m)[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, axis=1)
        p = p.to(dtype)
        acc0 = tl.dot(p, y0, acc0 * shrink[:, None], input_precision=PRECISION)
        if PIECES > 1:
            acc1 = tl.dot(p, y1, acc1 * shrink[:, None], input_precision=PRECISION)
        if PIECES > 2:
            acc2 = tl.dot(p, y2, acc2 * shrink[:, None], input_precision=PRECISION)
        if PIECES > 3:
            acc3 = tl.dot(p, y3, acc3 * shrink[:, None], input_precision=PRECISION)
        top = higher

    part = (1.0 / total)[:, None]
    _store_piece(out + at, live, 0, (acc0 * part).to(dtype), D)
    if PIECES > 1:
        _store_piece(out + at, live, PIECE, (acc1 * part).to(dtype), D)
    if PIECES > 2:
        _store_piece(out + at, live, 2 * PIECE, (acc2 * part).to(dtype), D)
    if PIECES > 3:
        _store_piece(out + at, live, 3 * PIECE, (acc3 * part).to(dtype), D)


def last_attention(
    x: Tensor,
    stats: Tensor,
    u: Tensor,
    head_dim: int,
    *,
    eps: float,
    key_bias: Tensor | None = None,
    zero_bias: float | None = None,
    precision: str = "ieee",
    config: Config | None = None,
) -> Tensor:
    """For each query, the average of the normalised rows under its softmax.

    Args:
        x: alive tokens, [B, m, D], D at most MOST_CHANNELS.
        stats: their statistics, [B, m, parts, 2], float32; see `row_stats`.
        u: queries taken through the key projection, whose rows bear the norm's weight,
            [B, queries, D], at most MOST_QUERIES of them.
        head_dim: d: logits are divided by its square root.
        eps: of the norm.
        key_bias: added to the logits of each key, [m] or [B, m], float32.
        zero_bias: logit bias of one more row, a zero row; None for no such row.
        precision: of float32 products, "ieee" or "tf32".
        config: instead of the table's.

    Returns:
        z, [B, queries, D]: before the norm's weight and bias.
    """
    batch, x_rows, width = x.shape
    queries = u.shape[1]
    out = x.new_empty(batch, queries, width)
    piece = _piece(width)
    config = config or lookup(
        "last_attention", architecture(x.device), x.element_size(), width, queries
    )
    _last_attention[(batch,)](
        *(x, stats, u, key_bias if key_bias is not None else stats, out),
        *(x_rows, x_rows, x_rows if key_bias is not None and key_bias.dim() == 2 else 0, queries),
        *(head_dim**-0.5, eps, zero_bias or 0.0),
        D=width,
        PARTS=stats.shape[2],
        PARTS_PADDED=power_of_two(stats.shape[2]),
        PIECE=piece,
        PIECES=-(-width // piece),
        BIAS=key_bias is not None,
        EXTRA=zero_bias is not None,
        PRECISION=precision,
        BLOCK_M=max(16, power_of_two(queries)),
        BLOCK_N=config.block_n,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )
    return out


def _piece(width: int) -> int:
    """A power of two that goes into a row at most four times, without waste where one does."""
    whole = width & -width
    return whole if width <= 4 * whole else max(16, power_of_two(-(-width // 4)))
