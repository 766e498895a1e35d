"""How a block is put together from fused GPU kernels, whichever back end has them."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from slimvit.backends.cuda import part_width
from slimvit.backends.fused_checks import (
    check,
    check_activation,
    check_eps,
    check_images,
    kernel_set,
    nothing,
    on_device,
    precision_of,
    require,
    require_tensor,
)
from slimvit.backends.fused_weights import BlockWeights, block_weights
from slimvit.errors import SlimvitError

__all__ = [
    "BlockWeights",
    "fused_block",
    "kernel_set",
    "part_width",
    "patch_embedding",
    "scatter_tokens",
    "second_half",
]


def patch_embedding(
    images: Tensor,
    weight: Tensor,
    table: Tensor,
    order: Tensor,
    prefix: int,
    tf32: bool = False,
    backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    """Tokens in lifetime order [B, N, D], and their statistics; see `slimvit.kernels`.

    What `order` holds is not looked at: on a GPU that would wait for it.
    """
    require(backend, weight.dim() == 4, "weight must be [D, C, ph, pw]", weight)
    require(backend, table.dim() == 2, "table must be [N, D]", table)
    tokens, width, device = len(table), weight.shape[0], weight.device
    require_tensor(backend, "table", table, (tokens, width), torch.float32, device)
    require_tensor(backend, "order", order, (tokens,), torch.int64, device)
    require(backend, 0 <= prefix <= tokens, f"prefix must be in [0, N] = [0, {tokens}]", prefix)
    fits = images.dim() == 4 and images.is_floating_point() and images.device == weight.device
    fits = fits and images.shape[1] == weight.shape[1]
    rule = f"images must be [B, {weight.shape[1]}, H, W], floating point, on {weight.device}"
    require(backend, fits, rule, images)
    down, across = images.shape[2] // weight.shape[2], images.shape[3] // weight.shape[3]
    rule = f"images must have as many patches as the table has rows for them, {tokens - prefix}"
    require(backend, down * across == tokens - prefix, rule, images)
    if not len(images):
        return nothing(weight, *table.shape)
    with on_device(images):
        return kernel_set(backend).patch_embedding(
            *(images.contiguous(), weight.contiguous(), table, order, prefix),
            precision=precision_of(tf32),
        )


def fused_block(
    x: Tensor,
    stats: Tensor | None,
    weights: list[Tensor],
    n: int,
    heads: int,
    activation: str,
    eps: list[float],
    zero_rows: int = 0,
    idle: bool = False,
    tf32: bool = False,
    index: Tensor | None = None,
    key_bias: Tensor | None = None,
    spread: Tensor | None = None,
    backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    """A block's kept rows, and their statistics; `ops.FusedBlock` says what it takes."""
    part = block_weights(backend, weights, heads)
    check(backend, x, stats, part, n, index, key_bias, spread)
    check_activation(backend, activation)
    check_eps(backend, eps)
    require(backend, zero_rows >= 0, "zero_rows must be at least 0", zero_rows)
    if idle and index is not None:
        raise SlimvitError(f"back end {backend}: idle tokens need kept tokens that come first")
    if idle and spread is not None:
        raise SlimvitError(f"back end {backend}: idle tokens stand for themselves, without spread")
    x, kernels = x.contiguous(), kernel_set(backend)
    if not len(x):
        return nothing(x, x.shape[1] if idle else n, x.shape[2])
    index = None if index is None else index.contiguous()
    key_bias = None if key_bias is None else key_bias.float().contiguous()
    with on_device(x):
        out = x.clone() if idle and n < x.shape[1] else None
        if hasattr(kernels, "whole_block") and not part.keys.numel() and spread is None:
            whole = kernels.whole_block(
                x, part, n, heads, activation, eps, key_bias, zero_rows, index, out
            )
            if whole is not None:
                return whole if out is None else (out, kernels.row_stats(out))
        stats = statistics(kernels, x, spread) if stats is None else stats
        shared = {"index": index, "precision": precision_of(tf32)}
        attend = _attend_last if part.keys.numel() else _attend
        a = attend(kernels, x, stats, part, n, heads, eps[0], key_bias, zero_rows, shared)
        if spread is not None:
            spread = spread[:, :n] if index is None else spread.gather(1, index)
            spread = spread.contiguous()
        result = second_half(kernels, a, x, part, eps[1], activation, out, shared, spread)
        return result if out is None else (out, kernels.row_stats(out))


def _attend(
    kernels: ModuleType,
    x: Tensor,
    stats: Tensor,
    part: BlockWeights,
    n: int,
    heads: int,
    eps: float,
    key_bias: Tensor | None,
    zero_rows: int,
    shared: dict,
) -> Tensor:
    inner = part.proj.shape[1]
    q, kv = kernels.slim_qkv(
        x, stats, part.qkv, part.qkv_sums, part.qkv_bias, n, inner, eps=eps, **shared
    )
    return kernels.slim_attention(
        q,
        kv,
        heads,
        key_bias=key_bias,
        extra=part.qkv_bias[inner:] if zero_rows else None,  # the norm maps a zero row to its bias
        extra_bias=math.log(zero_rows or 1),
        precision=shared["precision"],
    )


def _attend_last(
    kernels: ModuleType,
    x: Tensor,
    stats: Tensor,
    part: BlockWeights,
    n: int,
    heads: int,
    eps: float,
    key_bias: Tensor | None,
    zero_rows: int,
    shared: dict,
) -> Tensor:
    """The same for one or two kept tokens, without keys and values of the others."""
    (batch, _, width), inner = x.shape, part.proj.shape[1]
    precision = shared["precision"]
    sums, bias = part.qkv_sums[:inner], part.qkv_bias
    q, _ = kernels.slim_linear(
        x, part.qkv[:inner], bias[:inner], n=n, stats=stats, row_sums=sums, eps=eps, **shared
    )
    u, _ = kernels.slim_linear(q, part.keys, None, groups=heads, precision=precision)
    z = kernels.last_attention(
        x,
        stats,
        u.view(batch, n * heads, width),
        inner // heads,
        eps=eps,
        key_bias=key_bias,
        zero_bias=math.log(zero_rows) if zero_rows else None,
        precision=precision,
    )
    z, values = z.view(batch, n, heads * width), part.qkv[2 * inner :]
    return kernels.slim_linear(z, values, bias[2 * inner :], groups=heads, precision=precision)[0]


def second_half(
    kernels: ModuleType,
    a: Tensor,
    x: Tensor,
    part: BlockWeights,
    eps: float,
    activation: str,
    out: Tensor | None,
    shared: dict,
    spread: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Projection and MLP with their residuals: one launch where whole rows fit a program.

    `spread` [B, n] is that of the kept rows, contiguous; the statistics given include it.
    """
    precision = shared["precision"]
    proj, fc1, fc2 = part[3:5], part[5:7], part[8:10]
    squares = None if spread is None else part.fc1_squares
    several = {"spread": spread, "squares": squares}
    if kernels.halves(x.shape[2]):
        result, stats = kernels.slim_mlp(
            a, x, proj, fc1, fc2, eps=eps, activation=activation, out=out, **several, **shared
        )
        return result, add_spread(stats, spread, x.shape[2])
    y, stats = kernels.slim_linear(a, *proj, stage="proj", residual=x, emit=True, **shared)
    h, _ = kernels.slim_linear(
        y,
        *fc1,
        stage="fc1",
        stats=stats,
        row_sums=part.fc1_sums,
        eps=eps,
        activation=activation,
        precision=precision,
        **several,
    )
    result, stats = kernels.slim_linear(
        h, *fc2, stage="fc2", residual=y, out=out, emit=True, precision=precision
    )
    return result, add_spread(stats, spread, x.shape[2])


def statistics(kernels: ModuleType, x: Tensor, spread: Tensor | None) -> Tensor:
    """What blocks pass on of rows, [B, m, parts, 2]: their statistics, spread [B, m] included."""
    return add_spread(kernels.row_stats(x), spread, x.shape[2])


def add_spread(stats: Tensor, spread: Tensor | None, width: int) -> Tensor:
    """`stats`, changed to include the spread [B, m]: a norm reads it as part of the variance."""
    if spread is not None:
        stats[:, :, 0, 1].add_(spread, alpha=width)
    return stats


def scatter_tokens(x: Tensor, index: Tensor, length: int, backend: str = "triton") -> Tensor:
    """Kept tokens [B, K, D] at their places `index`, [K] or [B, K]: [B, N, D], zero elsewhere.

    What the index holds is not looked at: on a GPU that would wait for it.
    """
    require(backend, x.dim() == 3, "x must be [B, K, D]", x)
    shapes = ((x.shape[1],), (x.shape[0], x.shape[1]))
    fits = index.shape in shapes and index.dtype == torch.int64 and index.device == x.device
    rule = f"index must be [K] = [{x.shape[1]}] or [B, K], int64, on {x.device}"
    require(backend, fits, rule, index)
    rule = f"length must be at least the {x.shape[1]} tokens of x"
    require(backend, length >= x.shape[1], rule, length)
    check_images(backend, len(x))
    if not len(x):
        return x.new_empty(0, length, x.shape[2])
    with on_device(x):
        return kernel_set(backend).scatter_tokens(x.contiguous(), index, length)
