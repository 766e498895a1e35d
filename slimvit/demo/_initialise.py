"""Where the digits model starts from: without it a transformer learns little of 1347 images."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def initialise(model: Any) -> None:
    """Start with positions that tell neighbours apart, and with attention to similar tokens.

    Args:
        model: a timm VisionTransformer with one fused projection for query, key and value; its
            weights are overwritten.
    """
    grid, width = model.patch_embed.grid_size, model.embed_dim
    with torch.no_grad():
        model.pos_embed[0, model.num_prefix_tokens :] = 0.3 * waves(grid, width)
        for block in model.blocks:
            mimic(block.attn)


def waves(grid: tuple[int, int], width: int) -> Tensor:
    """Sines and cosines of row and column with 4 to 40 patches a period: [grid area, width]."""
    rates = torch.linspace(0.05, 0.5, width // 4) * math.pi
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    phases = [place.flatten()[:, None] * rates for place in (columns, rows)]
    return torch.cat([wave(phase) for phase in phases for wave in (torch.sin, torch.cos)], 1)


def mimic(attention: Any) -> None:
    """Wq Wkᵀ near the identity in each head, Wv Wo near its negative, as in trained transformers.

    Source: Mimetic Initialization of Self-Attention Layers (Trockman and Kolter, ICML 2023).
    """
    heads, size = attention.num_heads, attention.head_dim
    width = heads * size
    query, key, value = attention.qkv.weight.chunk(3)

    def near(noise: float, identity: float) -> tuple[Tensor, Tensor, Tensor]:
        noisy = noise * torch.randn(width, width) / math.sqrt(width)
        return torch.linalg.svd(noisy + identity * torch.eye(width))

    left, scale, right = near(0.4, -0.4)
    attention.proj.weight.copy_(left * scale.sqrt())
    value.copy_(scale.sqrt()[:, None] * right)
    for rows in torch.arange(width).split(size):
        left, scale, right = near(0.7, 0.7)
        query[rows] = (left[:, :size] * scale[:size].sqrt()).T
        key[rows] = scale[:size].sqrt()[:, None] * right[:size]
