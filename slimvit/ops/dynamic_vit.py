"""Blocks and networks that choose tokens for each image: the ops of the C++ kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slimvit.backends import cpu_dynamic
from slimvit.ops.choosers import REACH, AbsorbParts, ChooserParts, SelectorParts
from slimvit.ops.devices import require_one_device
from slimvit.ops.modules import activation_name, layer_norm_of
from slimvit.ops.network import NetworkParts
from slimvit.ops.slim_vit import PackedNetwork

_library = torch.library.Library("slimvit", "FRAGMENT")
_library.define(
    "dynamic_block(Tensor x, Tensor pack, Tensor chooser, SymInt n, int prefix,"
    " Tensor? size=None, Tensor? spread=None) -> (Tensor out, Tensor index, Tensor into,"
    " Tensor size_out, Tensor spread_out)"
)
_library.define(
    "dynamic_vit(Tensor images, Tensor packs, int[] sizes, int[] counts, int rows, int columns)"
    " -> (Tensor out, Tensor kept)"
)
_library.define(
    "select_tokens(Tensor x, Tensor pack, SymInt n, int prefix) -> (Tensor out, Tensor place)"
)
for _name in ("dynamic_block", "dynamic_vit", "select_tokens"):
    _library.impl(_name, getattr(cpu_dynamic, _name), "CPU")
    # For inference: answers need no gradient.
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("slimvit::dynamic_block", lib=_library)
def _dynamic_block(
    x: Tensor,
    pack: Tensor,
    chooser: Tensor,
    n: int,
    prefix: int,
    size: Tensor | None = None,
    spread: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    require_one_device("dynamic_block", x, pack, chooser, size, spread)
    m, batch, width = x.shape
    positions = x.new_empty(batch, m, dtype=torch.int64)
    return (
        x.new_empty(n, batch, width),
        positions.new_empty(batch, n),
        positions.new_empty(batch, m - n),
        x.new_empty(batch, n),
        x.new_empty(batch, n),
    )


@torch.library.register_fake("slimvit::dynamic_vit", lib=_library)
def _dynamic_vit(
    images: Tensor,
    packs: Tensor,
    sizes: list[int],
    counts: list[int],
    rows: int,
    columns: int,
) -> tuple[Tensor, Tensor]:
    require_one_device("dynamic_vit", images, packs)
    batch = images.shape[0]
    shape = (batch, rows, columns) if rows else (batch, columns)
    out = images.new_empty(shape, dtype=torch.float32)
    return out, images.new_empty(batch, sum(counts), dtype=torch.int64)


@torch.library.register_fake("slimvit::select_tokens", lib=_library)
def _select_tokens(x: Tensor, pack: Tensor, n: int, prefix: int) -> tuple[Tensor, Tensor]:
    require_one_device("select_tokens", x, pack)
    _, batch, width = x.shape
    return x.new_empty(n, batch, width), x.new_empty(batch, n, dtype=torch.int64)


def pack_chooser(parts: ChooserParts, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the ops take for how a block chooses.

    Args:
        parts: how.
        width: D.
        dtype: what the block computes in: float32, or bfloat16 accumulated in float32.

    Returns:
        uint8, one-dimensional; for the instruction set that `slimvit doctor` names.
    """
    if isinstance(parts, AbsorbParts):
        return _pack_attention(parts, width, dtype)
    if isinstance(parts, SelectorParts):
        return _pack_selector(parts, dtype)
    weight, bias, eps = layer_norm_of(parts.norm)
    return cpu_dynamic.pack_predictor(
        (weight, bias, parts.down.weight, parts.down.bias, parts.out.weight),
        dtype,
        activation=activation_name(parts.act),
        eps=eps,
    )


def _pack_attention(parts: AbsorbParts, width: int, dtype: torch.dtype) -> Tensor:
    under = parts.threshold
    options: dict[str, Any] = {}
    if under is not None:
        options = {"threshold": under.value, "before": under.before, "after": under.after}
    return cpu_dynamic.pack_attention(width, parts.head_tokens, REACH, dtype, **options)


def _pack_selector(parts: SelectorParts, dtype: torch.dtype) -> Tensor:
    it = parts.selector
    layers = (it.embed, it.judge1, it.judge2, it.judge3, it.weigh1, it.weigh2)
    weights = [it.norm_weight, it.norm_bias]
    weights += [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    return cpu_dynamic.pack_selector(
        weights,
        dtype,
        heads=it.heads,
        patches=parts.patches,
        fewest=parts.fewest,
        packages=parts.packages,
        eps=it.eps,
    )


class DynamicNetwork(PackedNetwork):
    """A network packed for the C++ kernels that chooses, for each image, what each block keeps.

    Args:
        parts: the network, its tokens in the model's own order; `counts` are those of the plan.
        choosers: how each block chooses, or the selector ahead of it; None where the first tokens
            are kept.
        dtype: what it computes in: float32, or bfloat16 accumulated in float32.

    Attributes:
        ragged: whether each image keeps a number of tokens of its own; `counts` is how many at
            most.
    """

    def __init__(
        self, parts: NetworkParts, choosers: Sequence[ChooserParts | None], dtype: torch.dtype
    ) -> None:
        width, empty = parts.table.shape[1], torch.empty(0, dtype=torch.uint8, device="cpu")
        packs = [empty if c is None else pack_chooser(c, width, dtype) for c in choosers]
        super().__init__(parts, dtype, packs)
        self.ragged = any(map(_is_ragged, choosers))
        if self.ragged:
            self.counts[:-1] = [self.tokens] * (len(self.counts) - 1)

    def kept(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens after the final norm, [B, n_L, D], and the places that each block kept, [B, n].

        Both in the order of the tokens; places count from 0 in the order of the embedding, those of
        packages from N. Where images keep numbers of their own, -1 fills up those of fewer.
        """
        out, places = self._run(images, self.counts[-1], self.width)
        return out, list(places.split(self.counts, dim=1))

    def _call(self, images: Tensor, rows: int, columns: int) -> Tensor:
        return self._run(images, rows, columns)[0]

    def _run(self, images: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        return torch.ops.slimvit.dynamic_vit(
            images, self.packs, self.sizes, self.counts, rows, columns
        )


def _is_ragged(parts: ChooserParts | None) -> bool:
    if isinstance(parts, SelectorParts):
        return parts.patches is None
    return isinstance(parts, AbsorbParts) and parts.threshold is not None
