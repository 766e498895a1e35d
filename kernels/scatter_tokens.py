"""The zero-padded scatter: every row of the result is written once, by whoever finds its source."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import power_of_two


@triton.jit(do_not_specialize=["kept", "length", "index_image"])
def _scatter_tokens(
    x,
    index,
    out,
    kept,
    length,
    index_image,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, KEPT_PADDED)
    place = tl.load(index + image * index_image + k, mask=k < kept, other=-1)
    found = place[None, :] == row[:, None]
    source = tl.max(tl.where(found, k[None, :] + 1, 0), axis=1) - 1  # -1: the token was pruned
    d = tl.arange(0, WIDE)
    inside = (d < D)[None, :]
    at = x + (image * kept + source)[:, None] * D + d[None, :]
    value = tl.load(at, mask=(source >= 0)[:, None] & inside, other=0.0)
    at = out + (image * length + row)[:, None] * D + d[None, :]
    tl.store(at, value, mask=(row < length)[:, None] & inside)


def scatter_tokens(x: Tensor, index: Tensor, length: int) -> Tensor:
    """Put kept tokens back in their places: out[b, index[b, k]] = x[b, k], zero elsewhere.

    One pass: a program compares its 16 places with the index of the image, which costs less than a
    pass that fills with zeros, and needs no order among programs.

    Args:
        x: kept tokens, [B, K, D], contiguous.
        index: their positions, [K] or [B, K], int64, distinct, in [0, length).
        length: tokens in the full sequence, N.

    Returns:
        [B, N, D], dtype and device of `x`.
    """
    batch, kept, width = x.shape
    out = x.new_empty(batch, length, width)
    _scatter_tokens[(triton.cdiv(length, 16), batch)](
        *(x, index.contiguous(), out, kept, length, kept if index.dim() == 2 else 0),
        D=width,
        WIDE=power_of_two(width),
        KEPT_PADDED=max(16, power_of_two(kept)),
        BLOCK_M=16,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out
