"""Static masks as a planner: the same kept sets for every image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimvit.dynamic.planner import Planner
from slimvit.masks import Masks
from slimvit.ops import Choice, View


class Static(Planner):
    """Keeps what the masks keep; `accelerate(model, masks)` does it without any gathering.

    Args:
        masks: kept sets with semantics `drop`; or `keep`, the booleans [L, N] alone.
    """

    kind = "static"

    def __init__(self, masks: Masks | None = None, *, shape: tuple[int, int] | None = None) -> None:
        keep = torch.ones(shape or (1, 1), dtype=torch.bool) if masks is None else masks.keep
        super().__init__(keep.sum(1).tolist())
        self.keep: Tensor
        self.register_buffer("keep", keep.clone())

    def choose(self, layer: int, view: View, n: int) -> Choice:
        """The tokens of the masks."""
        return view.top(self.keep[layer][view.alive.place].float(), n)

    def counts_for(self, spec: object) -> tuple[int, ...]:
        """n_1 … n_L of the masks."""
        return tuple(self.keep.sum(1).tolist())

    def settings(self) -> dict[str, Any]:
        """The shape of the booleans."""
        return {"shape": list(self.keep.shape)}
