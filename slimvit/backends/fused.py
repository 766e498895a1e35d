"""How a block is put together from fused GPU kernels, whichever back end has them.

A set of kernels is a module with the functions of `slimvit.kernels`: the Triton back end's is that
package itself, the CUDA back end's is `slimvit.backends.cuda_kernels`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from slimvit.backends import cuda, cuda_kernels, triton
from slimvit.backends.cuda import part_width  # as many parts in every set of kernels
from slimvit.errors import SlimvitError

_WHY_NOT = {"triton": triton.why_not, "cuda": cuda.why_not}
_KERNELS = {"triton": triton.kernel_set, "cuda": lambda: cuda_kernels}


class BlockWeights(NamedTuple):
    """The tensors of one block, in the order in which an op takes them.

    Norms are folded: weights times the norm's weight, biases plus the weight times the norm's bias.
    Matrices have the dtype that the block computes in, everything else is float32.

    Attributes:
        qkv: [3·H·d, D].
        qkv_bias: [3·H·d].
        qkv_sums: sums of the rows of `qkv`, as rounded.
        proj: [D, H·d].
        proj_bias: [D].
        fc1: [hidden, D].
        fc1_bias: [hidden].
        fc1_sums: sums of the rows of `fc1`, as rounded.
        fc2: [D, hidden].
        fc2_bias: [D].
        keys: for a block that keeps one or two tokens, the key projection of each head turned over,
            [H·D, d]; else an empty tensor.
    """

    qkv: Tensor
    qkv_bias: Tensor
    qkv_sums: Tensor
    proj: Tensor
    proj_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc1_sums: Tensor
    fc2: Tensor
    fc2_bias: Tensor
    keys: Tensor


def patch_embedding(
    images: Tensor,
    weight: Tensor,
    table: Tensor,
    order: Tensor,
    prefix: int,
    tf32: bool = False,
    backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    """Tokens in lifetime order [B, N, D], and their statistics; see `slimvit.kernels`."""
    fits = images.dim() == 4 and images.is_floating_point() and images.device == weight.device
    fits = fits and images.shape[1] == weight.shape[1]
    rule = f"images must be [B, {weight.shape[1]}, H, W], floating point, on {weight.device}"
    _require(backend, fits, rule, images)
    down, across = images.shape[2] // weight.shape[2], images.shape[3] // weight.shape[3]
    rule = f"images must have as many patches as the table has rows for them, {len(table) - prefix}"
    _require(backend, down * across == len(table) - prefix, rule, images)
    if not len(images):
        return _nothing(weight, *table.shape)
    with _on(images):
        return kernel_set(backend).patch_embedding(
            images.contiguous(), weight, table, order, prefix, precision=_precision(tf32)
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
    backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    """A block's kept rows, and their statistics; `ops.fused_block` says what it takes."""
    part = BlockWeights(*weights)
    _check(backend, x, stats, part, n, index, key_bias)
    if idle and index is not None:
        raise SlimvitError(f"back end {backend}: idle tokens need kept tokens that come first")
    x, kernels = x.contiguous(), kernel_set(backend)
    known = ", ".join(kernels.ACTIVATIONS)
    _require(
        backend, activation in kernels.ACTIVATIONS, f"activation must be one of {known}", activation
    )
    if not len(x):
        return _nothing(x, x.shape[1] if idle else n, x.shape[2])
    index = None if index is None else index.contiguous()
    key_bias = None if key_bias is None else key_bias.float().contiguous()
    with _on(x):
        out = x.clone() if idle and n < x.shape[1] else None
        if hasattr(kernels, "whole_block") and not part.keys.numel():
            whole = kernels.whole_block(
                x, part, n, heads, activation, eps, key_bias, zero_rows, index, out
            )
            if whole is not None:
                return whole if out is None else (out, kernels.row_stats(out))
        stats = kernels.row_stats(x) if stats is None else stats
        shared = {"index": index, "precision": _precision(tf32)}
        attend = _attend_last if part.keys.numel() else _attend
        a = attend(kernels, x, stats, part, n, heads, eps[0], key_bias, zero_rows, shared)
        result = _second_half(kernels, a, x, part, eps[1], activation, out, shared)
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


def _second_half(
    kernels: ModuleType,
    a: Tensor,
    x: Tensor,
    part: BlockWeights,
    eps: float,
    activation: str,
    out: Tensor | None,
    shared: dict,
) -> tuple[Tensor, Tensor]:
    """Projection and MLP with their residuals: one launch where whole rows fit a program."""
    precision = shared["precision"]
    proj, fc1, fc2 = part[3:5], part[5:7], part[8:10]
    if kernels.halves(x.shape[2]):
        return kernels.slim_mlp(
            a, x, proj, fc1, fc2, eps=eps, activation=activation, out=out, **shared
        )
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
    )
    return kernels.slim_linear(
        h, *fc2, stage="fc2", residual=y, out=out, emit=True, precision=precision
    )


def scatter_tokens(x: Tensor, index: Tensor, length: int, backend: str = "triton") -> Tensor:
    """Kept tokens [B, K, D] at their places `index`, [K] or [B, K]: [B, N, D], zero elsewhere."""
    _require(backend, x.dim() == 3, "x must be [B, K, D]", x)
    shapes = ((x.shape[1],), (x.shape[0], x.shape[1]))
    fits = index.shape in shapes and index.dtype == torch.int64 and index.device == x.device
    rule = f"index must be [K] = [{x.shape[1]}] or [B, K], int64, on {x.device}"
    _require(backend, fits, rule, index)
    if not len(x):
        return x.new_empty(0, length, x.shape[2])
    with _on(x):
        return kernel_set(backend).scatter_tokens(x.contiguous(), index, length)


def _check(
    backend: str,
    x: Tensor,
    stats: Tensor | None,
    part: BlockWeights,
    n: int,
    index: Tensor | None,
    key_bias: Tensor | None,
) -> None:
    width, dtype, device = part.qkv.shape[1], part.qkv.dtype, part.qkv.device
    ask = _ask_once if device.type == "cuda" else _ask  # a GPU stays what it is
    reason = ask(backend, device, dtype)
    if reason is not None:
        raise SlimvitError(f"back end {backend}: {reason}")
    rule = f"x must be [B, m, D] with D = {width}, {_name(dtype)}, on {device}"
    fits = x.dim() == 3 and x.shape[2] == width and x.dtype == dtype and x.device == device
    _require(backend, fits, rule, x)
    batch, m, _ = x.shape
    _require(backend, m > 0, "x must have tokens", x)
    _require(backend, 1 <= n <= m, f"n must be in [1, m] = [1, {m}]", n)
    if stats is not None:
        shape = (batch, m, width // part_width(width), 2)
        fits = stats.shape == shape and stats.dtype == torch.float32 and stats.device == device
        rule = f"stats must be [B, m, parts, 2] = {list(shape)}, float32, on {device}"
        _require(backend, fits, rule, stats)
    if index is not None:
        fits = index.shape == (batch, n) and index.dtype == torch.int64
        rule = f"index must be [B, n] = [{batch}, {n}], int64, on {device}"
        _require(backend, fits and index.device == device, rule, index)
    if key_bias is not None:
        fits = key_bias.shape in ((m,), (batch, m)) and key_bias.is_floating_point()
        rule = f"key_bias must be [m] = [{m}] or [B, m] = [{batch}, {m}], floating point"
        _require(backend, fits and key_bias.device == device, f"{rule}, on {device}", key_bias)


def kernel_set(backend: str) -> ModuleType:
    """The functions of a back end's kernels, by the names that `slimvit.kernels` gives them."""
    if backend not in _KERNELS:
        raise SlimvitError(f"back end must be one of {', '.join(_KERNELS)}, got {backend!r}")
    return _KERNELS[backend]()


def _ask(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return _WHY_NOT[backend](device, dtype)


_ask_once = functools.cache(_ask)


def _nothing(like: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """What an empty batch gives: no kernel is launched for it."""
    stats = like.new_empty(0, rows, width // part_width(width), 2, dtype=torch.float32)
    return like.new_empty(0, rows, width), stats


def _on(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be where the tensors are."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _precision(tf32: bool) -> str:
    return "tf32" if tf32 else "ieee"


def _require(backend: str, holds: bool, rule: str, got: Tensor | int | str) -> None:
    if holds:
        return
    if isinstance(got, Tensor):
        got = f"{list(got.shape)}, {_name(got.dtype)}, on {got.device}"
    raise SlimvitError(f"back end {backend}: {rule}, got {got}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
