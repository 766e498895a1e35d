"""How a block that chooses its tokens for each image is put together from fused GPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from slimvit.backends.fused import second_half, statistics
from slimvit.backends.fused_checks import (
    check,
    check_activation,
    check_eps,
    check_images,
    check_stats,
    kernel_set,
    nothing,
    on_device,
    precision_of,
    require,
    require_tensor,
)
from slimvit.backends.fused_weights import PredictorWeights, block_weights, predictor_weights
from slimvit.checks import dtype_name

__all__ = ["PredictorWeights", "absorb_block", "predicted_tokens"]


def absorb_block(
    x: Tensor,
    stats: Tensor | None,
    sizes: list[Tensor],
    weights: list[Tensor],
    norm: list[Tensor],
    n: int,
    heads: int,
    prefix: int,
    head_tokens: int,
    candidates: int,
    activation: str,
    eps: list[float],
    tf32: bool = False,
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A block that keeps n tokens of each image and averages the others into them.

    Args:
        x: alive tokens, [B, m, D], n < m.
        stats: their statistics, spread included, or None to compute them.
        sizes: how many tokens each stands for, [B, m], the log of that, and their spread; empty
            where each stands for itself alone. Float32.
        weights: the `BlockWeights`.
        norm: weight and bias of the block's first norm, [D] each, float32.
        n: tokens to keep, prefix < n.
        heads: H.
        prefix: leading tokens that are always kept and absorb nothing, head_tokens at least.
        head_tokens: leading tokens whose attention counts.
        candidates: patches of least importance that may be pruned, m - n at least.
        activation: of the MLP.
        eps: of the two norms.
        tf32: whether float32 products may be in TF32.
        backend: whose kernels.

    Returns:
        The kept rows after the block [B, n, D], their statistics, spread included, their sizes
        [B, n], the log of those, their spread, and which of the alive they are, [B, n], int64,
        ascending.
    """
    part = block_weights(backend, weights, heads)
    rule = "sizes must be the sizes, their logs and the spreads, or nothing"
    require(backend, len(sizes) in (0, 3), rule, len(sizes))
    size, key_bias, spread = sizes or (None, None, None)
    check(backend, x, stats, part, n, None, key_bias)
    check_activation(backend, activation)
    check_eps(backend, eps)
    _check_absorbed(backend, x, sizes, norm, n, prefix, head_tokens, candidates)
    if not len(x):
        kept, none = nothing(x, n, x.shape[2]), x.new_empty(0, n, dtype=torch.float32)
        return *kept, none, none.clone(), none.clone(), none.to(torch.int64)
    inner = part.proj.shape[1]
    x, kernels, precision = x.contiguous(), kernel_set(backend), precision_of(tf32)
    with on_device(x):
        stats = statistics(kernels, x, spread) if stats is None else stats
        head_q, kv = kernels.slim_qkv(
            *(x, stats, part.qkv, part.qkv_sums, part.qkv_bias, head_tokens, inner),
            eps=eps[0],
            precision=precision,
        )
        importance, score, cosine = kernels.absorb_scores(
            *(x, stats, head_q, kv, heads, prefix, candidates, *norm),
            eps=eps[0],
            key_bias=key_bias,
            precision=precision,
        )
        index, into = kernels.absorb_select(score, cosine, n, prefix)
        merged, merged_stats, *new_sizes = kernels.absorb_merge(
            x, stats, importance, index, into, size=size, spread=spread
        )
        q, _ = kernels.slim_linear(
            merged,
            part.qkv[:inner],
            part.qkv_bias[:inner],
            stats=merged_stats,
            row_sums=part.qkv_sums[:inner],
            eps=eps[0],
            precision=precision,
        )
        a = kernels.slim_attention(q, kv, heads, key_bias=key_bias, precision=precision)
        shared = {"index": None, "precision": precision}
        out, out_stats = second_half(
            kernels, a, merged, part, eps[1], activation, None, shared, new_sizes[2]
        )
    return out, out_stats, *new_sizes, index


def predicted_tokens(
    x: Tensor,
    stats: Tensor | None,
    weights: list[Tensor],
    n: int,
    prefix: int,
    activation: str,
    eps: float,
    tf32: bool = False,
    backend: str = "triton",
) -> Tensor:
    """The tokens of the highest predicted scores: score_i = w · act(W LN(x_i) + b).

    Args:
        x: alive tokens, [B, m, D].
        stats: their statistics, or None to compute them.
        weights: the `PredictorWeights`.
        n: tokens to keep, prefix < n < m.
        prefix: leading tokens that are always kept.
        activation: of the predictor.
        eps: of the norm.
        tf32: whether float32 products may be in TF32.
        backend: whose kernels.

    Returns:
        Positions among the alive, [B, n], int64, ascending; among equal scores the earlier.
    """
    part = predictor_weights(backend, weights)
    down = part.down
    fits = x.dim() == 3 and x.dtype == down.dtype and x.device == down.device
    dtype = dtype_name(down.dtype)
    rule = f"x must be [B, m, D] with D = {down.shape[1]}, {dtype}, on {down.device}"
    require(backend, fits and x.shape[2] == down.shape[1], rule, x)
    batch, m, _ = x.shape
    check_images(backend, batch)
    check_stats(backend, stats, x)
    check_activation(backend, activation)
    _check_choice(backend, n, m, prefix)
    if not batch:
        return x.new_empty(0, n, dtype=torch.int64)
    x, kernels = x.contiguous(), kernel_set(backend)
    with on_device(x):
        hidden, _ = kernels.slim_linear(
            x,
            part.down,
            part.down_bias,
            stats=kernels.row_stats(x) if stats is None else stats,
            row_sums=part.down_sums,
            eps=eps,
            activation=activation,
            precision=precision_of(tf32),
        )
        return kernels.top_tokens(hidden, n, prefix, weight=part.score)


def _check_absorbed(
    backend: str,
    x: Tensor,
    sizes: list[Tensor],
    norm: list[Tensor],
    n: int,
    prefix: int,
    head_tokens: int,
    candidates: int,
) -> None:
    batch, m, width = x.shape
    require(backend, len(norm) == 2, "norm must be a weight and a bias", len(norm))
    for name, tensor in zip(("weight", "bias"), norm):
        require_tensor(backend, f"{name} of the norm", tensor, (width,), torch.float32, x.device)
    require(backend, head_tokens in (1, 2), "head_tokens must be 1 or 2", head_tokens)
    _check_choice(backend, n, m, prefix)
    rule = f"prefix must be at least the {head_tokens} tokens that the head reads"
    require(backend, prefix >= head_tokens, rule, prefix)
    rule = f"candidates must be from m - n = {m - n} to the {m - prefix} patches"
    require(backend, m - n <= candidates <= m - prefix, rule, candidates)
    for tensor in sizes:
        rule = "sizes must be [B, m] ="
        require_tensor(backend, rule, tensor, (batch, m), torch.float32, x.device)


def _check_choice(backend: str, n: int, m: int, prefix: int) -> None:
    require(backend, prefix >= 0, "prefix must be at least 0", prefix)
    rule = f"n must be more than the {prefix} prefix tokens and less than m = {m}"
    require(backend, prefix < n < m, rule, n)
