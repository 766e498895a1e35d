"""Rectangular attention: n queries of the kept tokens over the m keys of the alive ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def slim_attention(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q kᵀ / sqrt(d) + key_bias) v.

    Args:
        q: queries of the kept tokens, [B, H, n, d].
        k: keys of the alive tokens, [B, H, m, d].
        v: their values, [B, H, m, d].
        key_bias: added to the logits of each key, [m] or [B, m], dtype of `q`; None for zero.
        dropout: probability of dropping an attention weight.

    Returns:
        [B, H, n, d].
    """
    if key_bias is not None:
        key_bias = key_bias[:, None, None, :] if key_bias.dim() == 2 else key_bias[None, None, None]
        key_bias = key_bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=key_bias, dropout_p=dropout)


def attention_probabilities(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(d)), [B, H, n, m], for [B, H, n, d] and [B, H, m, d]."""
    return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
