"""Static masks as a planner: the same kept sets for every image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimvit.dynamic.planner import Planner
from slimvit.errors import MasksError, PlanError
from slimvit.masks import Masks
from slimvit.models import Spec
from slimvit.ops import Choice, View


class Static(Planner):
    """Keeps what the masks keep; `accelerate(model, masks)` does it without any gathering.

    Args:
        masks: kept sets with semantics `drop`.
        shape: instead of masks, [L, N] of the booleans that a state dict will bring.

    Raises:
        PlanError: pruned tokens are something else than gone.
    """

    kind = "static-plan"

    def __init__(self, masks: Masks | None = None, *, shape: tuple[int, int] | None = None) -> None:
        if masks is not None and masks.semantics != "drop":
            raise PlanError(f"masks must have semantics 'drop', got {masks.semantics!r}")
        keep = (
            torch.ones(shape or (1, 1), dtype=torch.bool, device="cpu")
            if masks is None
            else masks.keep
        )
        super().__init__(keep.sum(1).tolist())
        self.keep: Tensor
        self.register_buffer("keep", keep.clone())

    def choose(self, layer: int, view: View, n: int) -> Choice:
        """The tokens of the masks."""
        return view.top(self.keep[layer][view.alive.place].float(), n)

    def counts_for(self, spec: Spec) -> tuple[int, ...]:
        """n_1 … n_L of the masks, which are checked against the model."""
        if self.keep.shape != (spec.depth, spec.tokens):
            raise PlanError(
                f"keep must be [L, N] = [{spec.depth}, {spec.tokens}] booleans, "
                f"got {list(self.keep.shape)}"
            )
        try:
            masks = Masks(self.keep.cpu(), spec.prefix, spec.grid)
        except MasksError as error:
            raise PlanError(str(error)) from error
        last = masks.keep[-1]
        if last[spec.prefix :].any() and not last[: spec.prefix].all():
            raise PlanError(
                f"the last block must keep all {spec.prefix} prefix tokens or no patch, "
                f"got prefix tokens {last[: spec.prefix].nonzero()[:, 0].tolist()}"
            )
        return masks.counts

    def settings(self) -> dict[str, Any]:
        """The shape of the booleans."""
        return {"shape": list(self.keep.shape)}
