"""Rectangular attention: n queries of the kept tokens over the m keys of the alive ones.

    out = softmax(q kᵀ / sqrt(d) + bias) v,   for every image and head

Up to 224 keys (128 where heads are wider than 64) all logits of a tile of queries stay in
registers, beside what is summed for the tile: one maximum, one exponential each. Keys come in up to
three pieces whose lengths are powers of two, so that 141 of them cost 144 and not 256. Longer rows
are taken piece by piece with a running maximum. In either way keys and values are read once, and
softmax is in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import architecture, power_of_two
from .configs import Config, lookup

LONGEST = {64: 224, 128: 128}
"""Keys whose logits stay in registers, by the width of a head."""
_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows_of(at, start, m, stride, D: tl.constexpr, WIDE: tl.constexpr, LENGTH: tl.constexpr):
    """Keys or values `start` … `start + LENGTH`, the last one again and again beyond the end."""
    row = tl.minimum(start + tl.arange(0, LENGTH), m - 1)
    d = tl.arange(0, WIDE)
    at += row[:, None] * stride + d[None, :]
    if D == WIDE:
        return tl.load(at)
    return tl.load(at, mask=(d < D)[None, :], other=0.0)


@triton.jit
def _logits(
    q,
    keys,
    bias,
    start,
    m,
    stride,
    scale,
    D: tl.constexpr,
    BIAS: tl.constexpr,
    LENGTH: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits of some keys, times log2(e); those beyond the end are -inf."""
    k = _rows_of(keys, start, m, stride, D, q.shape[1], LENGTH)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    key = start + tl.arange(0, LENGTH)
    if BIAS:
        s += (tl.load(bias + tl.minimum(key, m - 1)) * _LOG2E)[None, :]
    if LAST:
        s = tl.where((key < m)[None, :], s, float("-inf"))
    return s


@triton.jit(do_not_specialize=["n", "m", "bias_image"])
def _slim_attention(
    q,
    kv,
    bias,
    extra,
    out,
    n,
    m,
    bias_image,
    scale,
    extra_bias,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    HEADS: tl.constexpr,
    BIAS: tl.constexpr,
    EXTRA: tl.constexpr,
    PIECE_0: tl.constexpr,
    PIECE_1: tl.constexpr,
    PIECE_2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    head = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    inner: tl.constexpr = HEADS * D
    stride: tl.constexpr = 2 * inner
    # PIECE_1 < 0: of PIECE_0 keys each, as many pieces as there are.
    running: tl.constexpr = PIECE_1 < 0
    scale *= _LOG2E
    dtype = out.dtype.element_ty

    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, WIDE)
    at = q + (image * n + tl.minimum(row, n - 1))[:, None] * inner + head * D + d[None, :]
    tile = tl.load(at, mask=(d < D)[None, :], other=0.0)
    keys = kv + image * m * stride + head * D
    values = keys + inner
    bias += image * bias_image

    # The extra key, the same for all images, needs no place among the others.
    if EXTRA:
        k = tl.load(extra + head * D + d, mask=d < D, other=0.0).to(tl.float32)
        v = tl.load(extra + inner + head * D + d, mask=d < D, other=0.0).to(tl.float32)
        alone = tl.sum(tile.to(tl.float32) * k[None, :], axis=1) * scale + extra_bias * _LOG2E

    if running:
        top = alone if EXTRA else tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.full((BLOCK_M,), 1.0 if EXTRA else 0.0, tl.float32)
        acc = tl.zeros((BLOCK_M, WIDE), tl.float32)
        if EXTRA:
            acc += v[None, :]
        for start in range(0, m, PIECE_0):
            s = _logits(
                tile, keys, bias, start, m, stride, scale, D, BIAS, PIECE_0, True, PRECISION
            )
            higher = tl.maximum(top, tl.max(s, axis=1))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # all keys so far are shut out
            p = tl.exp2(s - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(p, axis=1)
            value = _rows_of(values, start, m, stride, D, WIDE, PIECE_0)
            acc = tl.dot(p.to(dtype), value, acc * shrink[:, None], input_precision=PRECISION)
            top = higher
    else:
        s0 = _logits(
            tile, keys, bias, 0, m, stride, scale, D, BIAS, PIECE_0, PIECE_1 == 0, PRECISION
        )
        top = tl.max(s0, axis=1)
        if PIECE_1 > 0:
            s1 = _logits(
                tile,
                keys,
                bias,
                PIECE_0,
                m,
                stride,
                scale,
                D,
                BIAS,
                PIECE_1,
                PIECE_2 == 0,
                PRECISION,
            )
            top = tl.maximum(top, tl.max(s1, axis=1))
        if PIECE_2 > 0:
            s2 = _logits(
                tile,
                keys,
                bias,
                PIECE_0 + PIECE_1,
                m,
                stride,
                scale,
                D,
                BIAS,
                PIECE_2,
                True,
                PRECISION,
            )
            top = tl.maximum(top, tl.max(s2, axis=1))
        if EXTRA:
            top = tl.maximum(top, alone)
        p0 = tl.exp2(s0 - top[:, None])
        total = tl.sum(p0, axis=1)
        value = _rows_of(values, 0, m, stride, D, WIDE, PIECE_0)
        acc = tl.dot(p0.to(dtype), value, input_precision=PRECISION)
        if PIECE_1 > 0:
            p1 = tl.exp2(s1 - top[:, None])
            total += tl.sum(p1, axis=1)
            value = _rows_of(values, PIECE_0, m, stride, D, WIDE, PIECE_1)
            acc = tl.dot(p1.to(dtype), value, acc, input_precision=PRECISION)
        if PIECE_2 > 0:
            p2 = tl.exp2(s2 - top[:, None])
            total += tl.sum(p2, axis=1)
            value = _rows_of(values, PIECE_0 + PIECE_1, m, stride, D, WIDE, PIECE_2)
            acc = tl.dot(p2.to(dtype), value, acc, input_precision=PRECISION)
        if EXTRA:
            p = tl.exp2(alone - top)
            total += p
            acc += p[:, None] * v[None, :]

    at = out + (image * n + row)[:, None] * inner + head * D + d[None, :]
    inside = (row < n)[:, None] & (d < D)[None, :]
    tl.store(at, (acc / total[:, None]).to(dtype), mask=inside)


def slim_attention(
    q: Tensor,
    kv: Tensor,
    heads: int,
    *,
    key_bias: Tensor | None = None,
    extra: Tensor | None = None,
    extra_bias: float = 0.0,
    precision: str = "ieee",
    config: Config | None = None,
) -> Tensor:
    """softmax(q kᵀ / sqrt(d) + bias) v for every head.

    Args:
        q: queries of the kept tokens, [B, n, H·d].
        kv: keys of the alive tokens, then their values, [B, m, 2·H·d].
        heads: H.
        key_bias: added to the logits of each key, [m] or [B, m], float32.
        extra: one more key and value that all images share, [2·H·d], float32.
        extra_bias: added to its logits.
        precision: of float32 products, "ieee" or "tf32".
        config: instead of the table's.

    Returns:
        [B, n, H·d].
    """
    batch, n, inner = q.shape
    m, d = kv.shape[1], inner // heads
    out = torch.empty_like(q)
    config = config or lookup("attention", architecture(q.device), q.element_size(), d, n)
    block_m = min(config.block_m, max(16, power_of_two(n)))
    sizes = pieces(m, d, config.block_n, q.dtype)
    _slim_attention[(triton.cdiv(n, block_m), heads, batch)](
        *(q, kv, key_bias if key_bias is not None else q, extra, out),
        *(n, m, m if key_bias is not None and key_bias.dim() == 2 else 0, d**-0.5, extra_bias),
        D=d,
        WIDE=max(16, power_of_two(d)),
        HEADS=heads,
        BIAS=key_bias is not None,
        EXTRA=extra is not None,
        PIECE_0=sizes[0],
        PIECE_1=sizes[1],
        PIECE_2=sizes[2],
        PRECISION=precision,
        BLOCK_M=block_m,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )
    return out


def pieces(m: int, d: int, running: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Into which pieces m keys are cut: three powers of two, or (`running`, -1, 0) for many.

    Float32 has no matrix instructions, and long rows of logits would not stay in registers.
    """
    longest = next((keys for width, keys in LONGEST.items() if d <= width), 0)
    if m > (64 if dtype == torch.float32 else longest):
        return running, -1, 0
    rest = -(-m // 16) * 16
    found = [1 << bit for bit in range(7, 3, -1) if rest >> bit & 1]
    return tuple([*found, 0, 0][:3])
