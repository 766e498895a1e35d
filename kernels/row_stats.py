"""Mean and squared deviations of rows: what a folded LayerNorm needs to know of its input."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import part_width, store_stats


@triton.jit(do_not_specialize=["rows"])
def _row_stats(x, out, rows, D: tl.constexpr, PART: tl.constexpr, BLOCK_M: tl.constexpr):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < rows
    at = x + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * D + tl.arange(0, PART)[None, :]
    for part in range(0, D // PART):
        value = tl.load(at + part * PART).to(tl.float32)
        store_stats(out, row, live, part, value, D // PART, PART)


def row_stats(x: Tensor) -> Tensor:
    """Statistics of rows: mean and sum of squared deviations of each part of a row.

    Args:
        x: [B, m, D], contiguous.

    Returns:
        [B, m, parts, 2], float32; parts are as wide as the greatest power of two, at most 64, that
        divides D.
    """
    batch, m, width = x.shape
    part = part_width(width)
    out = x.new_empty(batch, m, width // part, 2, dtype=torch.float32)
    _row_stats[(triton.cdiv(batch * m, 16),)](
        *(x, out, batch * m), D=width, PART=part, BLOCK_M=16, num_warps=4, enable_fp_fusion=True
    )
    return out
