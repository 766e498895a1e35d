"""The sum over all head paths of Eq. 6, exact in polynomial time."""

from __future__ import annotations

import torch
from torch import Tensor


def last_moment(batch: int, tokens: int, like: Tensor) -> Tensor:
    """C_L = I, [b, N, N]: where every path begins."""
    return torch.eye(tokens, dtype=like.dtype, device=like.device).expand(batch, -1, -1)


def step_moment(moment: Tensor, attention: Tensor, kept: Tensor) -> Tensor:
    """C_t = Σ_h P^{hᵀ} diag(m) C_{t+1} diag(m) P^h, with P and m of block t+1.

    C_t = Σ over paths of A_tᵀ A_t, where A_t is a product of one attention map per block above t.
    Its diagonal is the sum of the squared column norms over all H^(L-t) paths. Scaled to trace 1
    per image, since only ratios between tokens matter and the number of paths grows with H^(L-t).

    Args:
        moment: C_{t+1}, [b, N, N].
        attention: P_{t+1}, [b, H, N, N].
        kept: positions of S_{t+1}, int64: [n], or of each image its own, [b, n].

    Returns:
        C_t, [b, N, N].

    Source: Patch Slimming (Tang et al., CVPR 2022), Eq. 6.
    """
    if kept.ndim == 1:
        rows = attention.index_select(2, kept)  # [b, H, n, N]
        inner = moment.index_select(1, kept).index_select(2, kept)  # [b, n, n]
    else:
        rows = _rows(attention, kept[:, None].expand(-1, attention.shape[1], -1))
        inner = _rows(_rows(moment, kept).transpose(1, 2), kept)  # C is symmetric
    out = (rows.transpose(2, 3) @ (inner.unsqueeze(1) @ rows)).sum(1)
    return out / out.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[…, index[…, i], :], [… , n, N]."""
    return x.gather(-2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))
