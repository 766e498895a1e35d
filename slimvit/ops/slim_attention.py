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


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    key_bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q kᵀ / sqrt(d) + key_bias + log policy) v, differentiable where the policy is 0.

        a_ij = policy_j e^{l_ij} / Σ_k policy_k e^{l_ik}

    Args:
        q: queries, [B, H, n, d].
        k: keys, [B, H, m, d].
        v: their values, [B, H, m, d].
        policy: float32 in [0, 1], one at least above 0 in each image: [B, m].
        key_bias: added to the logits of each key, [m] or [B, m].
        dropout: probability of dropping an attention weight.

    Returns:
        [B, H, n, d], what `slim_attention` gives without the keys whose policy is 0.
    """
    logits = (q @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5
    if key_bias is not None:
        bias = key_bias[:, None, None, :] if key_bias.dim() == 2 else key_bias
        logits = logits + bias.float()
    policy = policy[:, None, None, :]
    seen = logits.masked_fill(policy == 0, -torch.inf).amax(-1, keepdim=True)
    # A hidden key counts for the gradient of its policy at most as much as the strongest seen one.
    weights = (logits - seen.detach()).clamp_max(0).exp() * policy
    weights = F.dropout(weights / weights.sum(-1, keepdim=True), dropout)
    return weights.to(v.dtype) @ v


def attention_probabilities(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(d)), [B, H, n, m], for [B, H, n, d] and [B, H, m, d]."""
    return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
