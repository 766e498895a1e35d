"""The zero-padded scatter: kept tokens back in their places."""

from __future__ import annotations

from torch import Tensor


def scatter_tokens(x: Tensor, index: Tensor, length: int) -> Tensor:
    """Put kept tokens back in their places: out[b, index[b, k]] = x[b, k], zero elsewhere.

    Args:
        x: kept tokens, [B, K, D].
        index: their positions, [K] or [B, K], int64, distinct, in [0, length).
        length: tokens in the full sequence, N.

    Returns:
        [B, N, D], dtype and device of `x`.

    Source: Patch Slimming (Tang et al., CVPR 2022), section 3, footnote 1.
    """
    batch, _, width = x.shape
    out = x.new_zeros(batch, length, width)
    if index.dim() == 1:
        return out.index_copy(1, index, x)
    return out.scatter(1, index.unsqueeze(-1).expand(-1, -1, width), x)
