"""How much each token of an image matters, and how much of it no better token stands for.

    importance_i = Σ_h mean_t softmax_j(q_t,h · k_j,h / sqrt(d) + bias_j)_i ‖v_i,h‖
    cosine_ij    = cosine of LN(x)_i and LN(x)_j
    score_i      = sqrt(importance_i) · (1 - max cosine_ij)

over the patches j ahead of i in importance, among equals the earlier. Only so many patches of least
importance are candidates: the score of any other token is infinite, so that it is kept.

Two launches: a program for each head, then one for some rows of the cosines of an image.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import architecture, mean_rstd, power_of_two
from .configs import Config, lookup

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LEAST_READ: tl.constexpr = tl.constexpr(2.4e-38)  # attention below it is none
_TINY: tl.constexpr = tl.constexpr(1e-12)  # the least norm, as of torch's normalize


@triton.jit
def _logits(keys, q, bias, start, m, stride, D: tl.constexpr, BIAS: tl.constexpr, BLOCK_N):
    """Logits of keys `start` …, times log2(e), in float32; those beyond the end are -inf."""
    key = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, q.shape[0])
    at = keys + tl.minimum(key, m - 1)[:, None] * stride + d[None, :]
    k = tl.load(at, mask=(d < D)[None, :], other=0.0).to(tl.float32)
    s = tl.sum(k * q[None, :], axis=1)
    if BIAS:
        s += tl.load(bias + tl.minimum(key, m - 1)) * _LOG2E
    return tl.where(key < m, s, float("-inf"))


@triton.jit
def _query(q, scale, D: tl.constexpr, WIDE: tl.constexpr):
    d = tl.arange(0, WIDE)
    return tl.load(q + d, mask=d < D, other=0.0).to(tl.float32) * (scale * _LOG2E)


@triton.jit
def _softmax_of(keys, q, bias, m, stride, D: tl.constexpr, BIAS: tl.constexpr, BLOCK_N):
    """The greatest logit of a query, and the sum of its softmax's terms beside it."""
    top = tl.max(_logits(keys, q, bias, 0, m, stride, D, BIAS, BLOCK_N), axis=0)
    for start in range(BLOCK_N, m, BLOCK_N):
        s = _logits(keys, q, bias, start, m, stride, D, BIAS, BLOCK_N)
        top = tl.maximum(top, tl.max(s, axis=0))
    total = 0.0
    for start in range(0, m, BLOCK_N):
        s = _logits(keys, q, bias, start, m, stride, D, BIAS, BLOCK_N)
        total += tl.sum(tl.exp2(s - top), axis=0)
    return top, total


@triton.jit(do_not_specialize=["m"])
def _absorb_importance(
    q,
    kv,
    bias,
    out,
    m,
    scale,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    inner: tl.constexpr = HEADS * D
    stride: tl.constexpr = 2 * inner
    q += image * TOKENS * inner + head * D
    keys = kv + image * m * stride + head * D
    values = keys + inner
    bias += image * m
    out += (image * HEADS + head) * m
    q0 = _query(q, scale, D, WIDE)
    top0, total0 = _softmax_of(keys, q0, bias, m, stride, D, BIAS, BLOCK_N)
    if TOKENS > 1:
        q1 = _query(q + inner, scale, D, WIDE)
        top1, total1 = _softmax_of(keys, q1, bias, m, stride, D, BIAS, BLOCK_N)
    d = tl.arange(0, WIDE)
    for start in range(0, m, BLOCK_N):
        s = _logits(keys, q0, bias, start, m, stride, D, BIAS, BLOCK_N)
        attention = tl.exp2(s - top0) / total0
        if TOKENS > 1:
            s = _logits(keys, q1, bias, start, m, stride, D, BIAS, BLOCK_N)
            attention = (attention + tl.exp2(s - top1) / total1) * 0.5
        attention = tl.where(attention < _LEAST_READ, 0.0, attention)
        key = start + tl.arange(0, BLOCK_N)
        at = values + tl.minimum(key, m - 1)[:, None] * stride + d[None, :]
        v = tl.load(at, mask=(d < D)[None, :], other=0.0).to(tl.float32)
        tl.store(out + key, attention * tl.sqrt(tl.sum(v * v, axis=1)), mask=key < m)


@triton.jit
def _sum_of_heads(parts, token, m, HEADS: tl.constexpr):
    """Importances, the same to the bit wherever and for however many tokens at once."""
    total = tl.load(parts + token)
    for head in range(1, HEADS):
        total += tl.load(parts + head * m + token)
    return total


@triton.jit
def _ordered(importance):
    """What tokens are compared by: NaN is least."""
    return tl.where(importance != importance, float("-inf"), importance)


@triton.jit
def _normed(x, row, mean, rstd, weight, bias, start, D: tl.constexpr, BLOCK_K: tl.constexpr):
    """Channels `start` … of LN(x), in the dtype of `x`."""
    k = start + tl.arange(0, BLOCK_K)
    inside = k < D
    y = tl.load(x + row[:, None] * D + k[None, :], mask=inside[None, :], other=0.0)
    w = tl.load(weight + k, mask=inside, other=0.0)
    b = tl.load(bias + k, mask=inside, other=0.0)
    y = (y.to(tl.float32) - mean[:, None]) * rstd[:, None] * w[None, :] + b[None, :]
    return y.to(x.dtype.element_ty)


@triton.jit(do_not_specialize=["m", "prefix", "candidates"])
def _absorb_scores(
    x,
    stats,
    weight,
    norm_bias,
    parts,
    importance,
    score,
    cosine,
    m,
    prefix,
    candidates,
    eps,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = place < m
    place = tl.minimum(place, m - 1)
    parts += image * HEADS * m
    mine = _sum_of_heads(parts, place, m, HEADS)
    row = image * m + place
    mean, rstd = mean_rstd(stats, row, eps, D, PARTS, PARTS_PADDED)
    nearest = tl.full((BLOCK_M,), -1.0, tl.float32)
    rank = tl.zeros((BLOCK_M,), tl.int32)  # patches ahead
    my_order = _ordered(mine)[:, None]
    for first in range(0, m, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        there = column < m
        column = tl.minimum(column, m - 1)
        other = image * m + column
        other_mean, other_rstd = mean_rstd(stats, other, eps, D, PARTS, PARTS_PADDED)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        square = tl.zeros((BLOCK_M,), tl.float32)
        other_square = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, D, BLOCK_K):
            a = _normed(x, row, mean, rstd, weight, norm_bias, start, D, BLOCK_K)
            b = _normed(x, other, other_mean, other_rstd, weight, norm_bias, start, D, BLOCK_K)
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
            a, b = a.to(tl.float32), b.to(tl.float32)
            square += tl.sum(a * a, axis=1)
            other_square += tl.sum(b * b, axis=1)
        norm = tl.maximum(tl.sqrt(square), _TINY)
        acc = acc / (norm[:, None] * tl.maximum(tl.sqrt(other_square), _TINY)[None, :])
        theirs = _ordered(_sum_of_heads(parts, column, m, HEADS))[None, :]
        ahead = (theirs == my_order) & (column[None, :] < place[:, None])
        ahead = (theirs > my_order) | ahead
        ahead = ahead & (there & (column >= prefix))[None, :]
        acc = tl.where(ahead, acc, -1.0)
        inside = live[:, None] & there[None, :]
        tl.store(cosine + row[:, None] * m + column[None, :], acc, mask=inside)
        nearest = tl.maximum(nearest, tl.max(acc, axis=1))
        rank += tl.sum(ahead.to(tl.int32), axis=1)
    tl.store(importance + row, mine, mask=live)
    candidate = rank >= m - prefix - candidates
    value = tl.where(candidate, tl.sqrt(mine) * (1.0 - nearest), float("inf"))
    tl.store(score + row, value, mask=live)


def absorb_scores(
    x: Tensor,
    stats: Tensor,
    q: Tensor,
    kv: Tensor,
    heads: int,
    prefix: int,
    candidates: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float,
    key_bias: Tensor | None = None,
    precision: str = "ieee",
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What tokens are chosen by: importances, scores, and the cosines between them.

    Args:
        x: alive tokens, [B, m, D].
        stats: their statistics, [B, m, parts, 2], float32; see `row_stats`.
        q: queries of the tokens that the head reads, [B, T, H·d], T one or two.
        kv: keys of the alive tokens, then their values, [B, m, 2·H·d].
        heads: H.
        prefix: leading tokens, which stand for no other.
        candidates: patches of least importance that may be pruned.
        norm_weight: the norm's weight, [D], float32.
        norm_bias: its bias, [D], float32.
        eps: of the norm.
        key_bias: added to the logits of each key, [B, m], float32; None for zero.
        precision: of float32 products, "ieee" or "tf32".
        config: instead of the table's, for the cosines.

    Returns:
        Importances [B, m], scores [B, m] and cosines [B, m, m], float32; of each token with those
        ahead of it, and -1 with the others.
    """
    batch, m, width = x.shape
    tokens, inner = q.shape[1:]
    d = inner // heads
    parts = x.new_empty(batch, heads, m, dtype=torch.float32)
    _absorb_importance[(heads, batch)](
        *(q, kv, key_bias if key_bias is not None else stats, parts, m, d**-0.5),
        TOKENS=tokens,
        HEADS=heads,
        D=d,
        WIDE=max(16, power_of_two(d)),
        BIAS=key_bias is not None,
        BLOCK_N=min(128, max(16, power_of_two(m))),
        num_warps=4,
        enable_fp_fusion=True,
    )
    importance, score = (x.new_empty(batch, m, dtype=torch.float32) for _ in range(2))
    cosine = x.new_empty(batch, m, m, dtype=torch.float32)
    config = config or lookup("absorb", architecture(x.device), x.element_size(), width, batch * m)
    _absorb_scores[(triton.cdiv(m, config.block_m), batch)](
        *(x, stats, norm_weight, norm_bias, parts, importance, score, cosine),
        *(m, prefix, candidates, eps),
        HEADS=heads,
        D=width,
        PARTS=stats.shape[2],
        PARTS_PADDED=power_of_two(stats.shape[2]),
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )
    return importance, score, cosine
