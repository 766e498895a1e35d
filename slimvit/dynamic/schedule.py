"""How many tokens each block keeps, from the share of the model's work that is to be saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from slimvit.errors import PlanError
from slimvit.macs import gmacs
from slimvit.models import Spec


class Shape(NamedTuple):
    """How the counts fall with depth.

    Attributes:
        whole: blocks at the start that keep every token: before them patches know too little.
        power: of the fall; 1 takes as many tokens in each block, more takes more of them later.
        floor: share of the patches that all blocks but the last one keep.
    """

    whole: int = 2
    power: float = 1.0
    floor: float = 1 / 8


def check_cut(cut: float | None, counts: Sequence[int] | None) -> None:
    """Refuse neither or both, and a cut out of range."""
    if (cut is None) == (counts is None):
        raise PlanError("give one of cut and counts")
    if cut is not None and not 0 < cut < 1:
        raise PlanError(f"cut must lie in (0, 1), got {cut}")


def counts_for_cut(
    spec: Spec,
    cut: float,
    planner: Callable[[tuple[int, ...]], object],
    shape: Shape | None = None,
) -> tuple[int, ...]:
    """Counts n_l = N − step · max(0, l − whole)^power, not below the floor, that save `cut`.

    The last block computes only what the head reads. What the planner itself computes counts too.

    Args:
        spec: the model's shape.
        cut: share of the dense model's multiply–accumulates to save, in (0, 1).
        planner: makes the planner that keeps given counts.
        shape: of the fall.

    Raises:
        PlanError: the cut is out of reach for this model and shape.
    """
    shape = Shape() if shape is None else shape

    def counts(step: float) -> tuple[int, ...]:
        return _falling(spec, step, shape)

    def saved(step: float) -> float:
        return 1 - gmacs(spec, planner(counts(step)).bind(spec)) / gmacs(spec)

    low, high = 0.0, float(spec.patches)
    if saved(high) < cut:
        raise PlanError(f"cut must be at most {saved(high):.3f} for {spec.name}, got {cut}")
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if saved(middle) < cut else (low, middle)
    return counts(high)


def _falling(spec: Spec, step: float, shape: Shape) -> tuple[int, ...]:
    floor = spec.prefix + max(1, round(shape.floor * spec.patches))
    steps = (max(0, layer - shape.whole) ** shape.power for layer in range(1, spec.depth))
    return (*(max(floor, round(spec.tokens - step * k)) for k in steps), spec.head_tokens)
