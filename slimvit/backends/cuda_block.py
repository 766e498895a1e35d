"""The CUDA C++ kernel of a whole block, and when it pays."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from slimvit.backends import cuda

# Widths of blocks that are one launch, and how busy that must keep the multiprocessors: a guess.
WIDTHS = (192, 384)
BUSY = 0.75


def whole_block(
    x: Tensor,
    part: Any,
    n: int,
    heads: int,
    activation: str,
    eps: list[float],
    key_bias: Tensor | None,
    zero_rows: int,
    index: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """A block in one launch, or None where that does not fit or would leave the GPU idle.

    An image is one block of threads, so few of them would leave multiprocessors without work.
    """
    batch, _, width = x.shape
    if not x.is_cuda or width not in WIDTHS or not pays(batch, _multiprocessors(x.get_device())):
        return None
    return fused_block(x, part, n, heads, activation, eps, key_bias, zero_rows, index, out)


def pays(batch: int, multiprocessors: int) -> bool:
    """Whether images, one to a multiprocessor at a time, keep them busy: also in the last turn."""
    turns = math.ceil(batch / multiprocessors)
    return batch >= max(1, BUSY * turns) * multiprocessors


def fused_block(
    x: Tensor,
    part: Any,
    n: int,
    heads: int,
    activation: str,
    eps: list[float],
    key_bias: Tensor | None = None,
    zero_rows: int = 0,
    index: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """A block in one launch, whatever the batch; None where it does not fit.

    `part` are the `BlockWeights` of `slimvit.backends.fused`; other arguments are those of its
    `fused_block`.
    """
    batch, m, width = x.shape
    hidden = part.fc1.shape[0]
    if part.proj.shape[1] != width:
        return None
    if not cuda.module().fused_block_stages(width=width, heads=heads, hidden=hidden, m=m, n=n):
        return None
    out = x.new_empty(batch, n, width) if out is None else out
    stats = x.new_empty(
        batch, out.shape[1], width // cuda.part_width(width), 2, dtype=torch.float32
    )
    cuda.call(
        cuda.module().fused_block,
        x,
        x=x,
        qkv=part.qkv,
        qkv_bias=part.qkv_bias,
        proj=part.proj,
        proj_bias=part.proj_bias,
        fc1=part.fc1,
        fc1_bias=part.fc1_bias,
        fc2=part.fc2,
        fc2_bias=part.fc2_bias,
        key_bias=key_bias,
        index=index,
        out=out,
        out_stats=stats,
        batch=batch,
        m=m,
        n=n,
        out_rows=out.shape[1],
        width=width,
        heads=heads,
        hidden=hidden,
        bias_image=cuda.per_image(key_bias),
        has_extra=int(zero_rows > 0),
        extra_bias=math.log(zero_rows or 1),
        eps1=eps[0],
        eps2=eps[1],
        activation=activation,
    )
    return out, stats


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
