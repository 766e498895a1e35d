"""The pieces of a model with SPViT's selectors, apart, as the back end that would run them does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slimvit.dynamic import Alive
from slimvit.models import Spec
from slimvit.ops import pack_chooser
from slimvit.runtime import AcceleratedViT
from slimvit.runtime.fused_dynamic import FusedDynamicViT
from slimvit.runtime.packed_dynamic import PackedDynamicViT

Piece = Callable[[Tensor], Any]


def pieces(probe: AcceleratedViT, tokens: int, batch: int, shape: Spec) -> list[Piece]:
    """Blocks in turn, the last block, and a selector, on that many tokens; images are ignored.

    Args:
        probe: an accelerated model with a selector before its first block.
        tokens: of each image, prefix tokens included.
        batch: images.
        shape: of the model.
    """
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, batch, shape.width, generator=generator)
    if isinstance(probe, PackedDynamicViT):
        return _packed(probe, x, shape)
    if isinstance(probe, FusedDynamicViT):
        return _fused(probe, x, shape)
    alive = Alive(x.to(next(probe.plan.parameters())), torch.arange(tokens).expand(batch, -1))
    alive = alive._replace(place=alive.place.to(alive.x.device))
    block, last = probe.network.block, shape.depth - 1

    def chain(_: Tensor) -> None:
        left = alive
        # One block alone would find its weights in cache, as it does not in a model.
        for layer in range(1, last):
            left = block(layer, left)

    kept = _kept(tokens - shape.prefix)
    return [chain, lambda _: block(last, alive), lambda _: probe.plan.prune(0, alive, kept)]


def _packed(probe: PackedDynamicViT, x: Tensor, shape: Spec) -> list[Piece]:
    network, tokens = probe.packed, len(x)
    packs = network.parts()[1 : shape.depth + 1]
    kept = _kept(tokens - shape.prefix)
    selector = pack_chooser(probe.plan.parts(0)._replace(patches=kept), shape.width, network.dtype)

    def chain(_: Tensor) -> None:
        left = x
        for pack in packs[1:-1]:
            left = torch.ops.slimvit.slim_block(left, pack, tokens)

    def select(_: Tensor) -> Tensor:
        left = shape.prefix + kept + 1
        return torch.ops.slimvit.select_tokens(x, selector, left, shape.prefix)[0]

    head = shape.head_tokens
    return [chain, lambda _: torch.ops.slimvit.slim_block(x, packs[-1], head), select]


def _fused(probe: FusedDynamicViT, x: Tensor, shape: Spec) -> list[Piece]:
    network, tokens = probe.fused, len(x)
    x = x.transpose(0, 1).contiguous().to(network.table.device, network.dtype)
    selecting, *blocks, last = network.blocks

    def chain(_: Tensor) -> None:
        left, stats = x, None
        for block in blocks:
            left, stats = block(left, tokens, stats)

    def select(_: Tensor) -> Tensor:
        return selecting.select(x, _kept(tokens - shape.prefix), shape.prefix)[0]

    return [chain, lambda _: last(x, shape.head_tokens), select]


def _kept(patches: int) -> int:
    """How many a selector keeps that is timed: seven in ten, neither all nor none."""
    return max(1, min(round(0.7 * patches), patches - 1))
