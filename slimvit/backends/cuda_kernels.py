"""The CUDA C++ kernels: the calls that take tensors.

Functions have the names and the meaning of those of `slimvit.kernels`; what that package says of
shapes and dtypes is not said again here. Matrices are float16 or bfloat16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slimvit.backends import cuda
from slimvit.backends.cuda_block import fused_block, whole_block
from slimvit.backends.cuda_choosing import absorb_merge, absorb_scores, absorb_select, top_tokens
from slimvit.backends.cuda_selector import package_tokens, selector_choose, selector_judge

__all__ = [
    "ACTIVATIONS",
    "absorb_merge",
    "absorb_scores",
    "absorb_select",
    "fused_block",
    "halves",
    "last_attention",
    "package_tokens",
    "patch_embedding",
    "row_stats",
    "scatter_tokens",
    "selector_choose",
    "selector_judge",
    "slim_attention",
    "slim_linear",
    "slim_qkv",
    "top_tokens",
    "whole_block",
]
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu")
WIDEST_HEAD, WIDEST_LAST = 128, 1024  # see slim_attention.cu, last_attention.cu


def halves(width: int) -> tuple[int, int] | None:
    """None: there is no kernel that computes a block's second half in one launch."""
    return None


def row_stats(x: Tensor) -> Tensor:
    """Statistics of rows, [B, m, parts, 2]."""
    batch, m, width = x.shape
    cuda.eights(width=width)
    part = cuda.part_width(width)
    out = x.new_empty(batch, m, width // part, 2, dtype=torch.float32)
    cuda.call(cuda.module().row_stats, x, x=x, out=out, rows=batch * m, width=width, part=part)
    return out


def slim_qkv(
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    row_sums: Tensor,
    bias: Tensor,
    n: int,
    inner: int,
    *,
    eps: float,
    index: Tensor | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Queries of the kept rows, keys and values of all rows, of LN(x), in one launch."""
    batch, m, _ = x.shape
    q, kv = x.new_empty(batch, n, inner), x.new_empty(batch, m, 2 * inner)
    _linear(
        x,
        weight,
        bias,
        n=n,
        stats=stats,
        row_sums=row_sums,
        eps=eps,
        index=index,
        out=q,
        tail_out=kv,
    )
    return q, kv


def slim_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stage: str = "linear",
    n: int | None = None,
    groups: int = 1,
    stats: Tensor | None = None,
    row_sums: Tensor | None = None,
    eps: float = 0.0,
    activation: str = "none",
    residual: Tensor | None = None,
    index: Tensor | None = None,
    spread: Tensor | None = None,
    squares: Tensor | None = None,
    out: Tensor | None = None,
    emit: bool = False,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor | None]:
    """act(LN(x) Wᵀ + b) + residual of rows, and the statistics of the result where asked."""
    batch, columns = x.shape[0], weight.shape[0]
    n = x.shape[1] if n is None else n
    out = x.new_empty(batch, n, columns) if out is None else out
    out_stats = None
    if emit:
        parts = columns // cuda.part_width(columns)
        out_stats = x.new_empty(batch, out.shape[1], parts, 2, dtype=torch.float32)
    _linear(
        x,
        weight,
        bias,
        n=n,
        groups=groups,
        stats=stats,
        row_sums=row_sums,
        eps=eps,
        activation=activation,
        residual=residual,
        index=index,
        spread=spread,
        squares=squares,
        out=out,
        out_stats=out_stats,
    )
    return out, out_stats


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    n: int,
    out: Tensor,
    groups: int = 1,
    tail_out: Tensor | None = None,
    stats: Tensor | None = None,
    row_sums: Tensor | None = None,
    eps: float = 0.0,
    activation: str = "none",
    residual: Tensor | None = None,
    index: Tensor | None = None,
    spread: Tensor | None = None,
    squares: Tensor | None = None,
    out_stats: Tensor | None = None,
) -> None:
    batch, x_rows, stride = x.shape
    columns = out.shape[2] // groups
    cuda.eights(inner=stride // groups, columns=columns)
    cuda.call(
        cuda.module().slim_linear,
        x,
        x=x,
        stats=stats,
        weight=weight,
        row_sums=row_sums,
        spread=spread,
        squares=squares,
        bias=bias,
        residual=residual,
        index=index,
        out=out,
        tail_out=tail_out,
        out_stats=out_stats,
        batch=batch,
        n=n,
        x_rows=x_rows,
        residual_rows=0 if residual is None or residual.shape[0] < batch else residual.shape[1],
        out_rows=out.shape[1],
        groups=groups,
        inner=stride // groups,
        columns=columns,
        tail_columns=0 if tail_out is None else tail_out.shape[2],
        x_parts=1 if stats is None else stats.shape[2],
        part=cuda.part_width(columns),
        eps=eps,
        activation=activation,
    )


def slim_attention(
    q: Tensor,
    kv: Tensor,
    heads: int,
    *,
    key_bias: Tensor | None = None,
    extra: Tensor | None = None,
    extra_bias: float = 0.0,
    precision: str = "ieee",
) -> Tensor:
    """softmax(q kᵀ / sqrt(d) + bias) v for every head."""
    batch, n, inner = q.shape
    cuda.eights(head_dim=inner // heads)
    cuda.at_most("head_dim", inner // heads, WIDEST_HEAD)
    out = torch.empty_like(q)
    cuda.call(
        cuda.module().slim_attention,
        q,
        q=q,
        kv=kv,
        key_bias=key_bias,
        extra=extra,
        out=out,
        batch=batch,
        n=n,
        m=kv.shape[1],
        heads=heads,
        d=inner // heads,
        bias_image=cuda.per_image(key_bias),
        extra_bias=extra_bias,
    )
    return out


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
) -> Tensor:
    """For each query, the average of the normalised rows under its softmax."""
    batch, m, width = x.shape
    cuda.eights(width=width)
    cuda.at_most("width", width, WIDEST_LAST)
    out = x.new_empty(batch, u.shape[1], width)
    cuda.call(
        cuda.module().last_attention,
        x,
        x=x,
        stats=stats,
        u=u,
        key_bias=key_bias,
        out=out,
        batch=batch,
        m=m,
        width=width,
        queries=u.shape[1],
        parts=stats.shape[2],
        bias_image=cuda.per_image(key_bias),
        scale=head_dim**-0.5,
        eps=eps,
        has_zero=int(zero_bias is not None),
        zero_bias=zero_bias or 0.0,
    )
    return out


def patch_embedding(
    images: Tensor,
    weight: Tensor,
    table: Tensor,
    order: Tensor,
    prefix: int,
    *,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Tokens in lifetime order, and their statistics."""
    batch, channels, height, width = images.shape
    down, across = weight.shape[2:]
    rows, columns = height // down, width // across
    images = images[..., : rows * down, : columns * across]
    patches = images.reshape(batch, channels, rows, down, columns, across)
    flat, count = weight.flatten(1), rows * columns
    inner = flat.shape[1]
    spare = -inner % 8  # rows are read 16 bytes at a time
    x = weight.new_empty(batch, count + 1, inner + spare)
    x[:, count] = 0  # prefix tokens, wherever they are, are their row of the table alone
    x[:, :count, inner:] = 0
    grid = x[:, :count, :inner].unflatten(2, (channels, down, across)).unflatten(1, (rows, columns))
    grid.copy_(patches.permute(0, 2, 4, 1, 3, 5))
    x = x.index_select(1, torch.where(order < prefix, count, order - prefix))
    table = table.to(weight.dtype)[None]
    return slim_linear(x, F.pad(flat, (0, spare)), None, residual=table, emit=True)


def scatter_tokens(x: Tensor, index: Tensor, length: int) -> Tensor:
    """Put kept tokens back in their places: out[b, index[b, k]] = x[b, k], zero elsewhere."""
    batch, kept, width = x.shape
    cuda.eights(width=width)
    out = x.new_empty(batch, length, width)
    cuda.call(
        cuda.module().scatter_tokens,
        x,
        x=x,
        index=index.contiguous(),
        out=out,
        batch=batch,
        kept=kept,
        length=length,
        width=width,
        index_image=cuda.per_image(index),
    )
    return out
