"""A slimmed network as back ends of fused kernels read it, and what such kernels ask of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from slimvit.ops.folded_block import FoldedBlock
from slimvit.ops.modules import activation_name
from slimvit.ops.slim_block import BlockParts, ExtraKey


class NetworkParts(NamedTuple):
    """A slimmed network after folding, whatever the names in the foreign model.

    Attributes:
        image_size: height and width in pixels.
        patch_weight: [D, C, ph, pw].
        table: what each token starts from, in lifetime order, [N, D]: patch bias and position, or
            the prefix token itself.
        order: which token comes where in lifetime order, [N], int64.
        prefix: class, distillation and register tokens.
        norm_pre: LayerNorm after the embedding, or Identity.
        blocks: the blocks.
        extra_keys: of each block, the key that stands for zero rows, or None.
        zero_rows: how many zero rows that key stands for.
        norm: final LayerNorm, or Identity.
        heads: linear layers, each of a token of its own, whose logits are averaged; empty where
            logits need anything more.
        counts: kept tokens n of each block.
        idle: whether pruned tokens stay keys and values.
    """

    image_size: tuple[int, int]
    patch_weight: Tensor
    table: Tensor
    order: Tensor
    prefix: int
    norm_pre: nn.Module
    blocks: list[FoldedBlock | BlockParts]
    extra_keys: list[ExtraKey | None]
    zero_rows: list[int]
    norm: nn.Module
    heads: list[nn.Linear]
    counts: tuple[int, ...]
    idle: bool


def why_not_plain(block: FoldedBlock | BlockParts) -> str | None:
    """Why fused kernels, C++ or Triton, do not compute a block, or None if they do."""
    if not isinstance(block, FoldedBlock):
        return FoldedBlock.why_not(block) or "it was not folded"
    if activation_name(block.act) is None:
        return f"the activation is {type(block.act).__name__}, not GELU or QuickGELU"
    hidden, width = block.fc1.weight.shape
    return _divides(width=width, head_dim=block.head_dim, hidden=hidden)


def _divides(**sizes: int) -> str | None:
    for name, size in sizes.items():
        if size % 16:
            return f"{name} must be a multiple of 16, got {size}"
    return None
