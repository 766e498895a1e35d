"""How many tokens each block keeps, from the share of the model's work that is to be saved."""

from __future__ import annotations

from collections.abc import Sequence

from slimvit.dynamic.planner import Planner
from slimvit.errors import PlanError
from slimvit.macs import gmacs
from slimvit.models import Spec

_WHOLE = 2  # blocks at the start that keep every token: before them patches know too little
_FLOOR = 1 / 8  # of the patches, kept to the last block but one


def check_cut(cut: float | None, counts: Sequence[int] | None) -> None:
    """Refuse neither or both, and a cut out of range."""
    if (cut is None) == (counts is None):
        raise PlanError("give one of cut and counts")
    if cut is not None and not 0 < cut < 1:
        raise PlanError(f"cut must lie in (0, 1), got {cut}")


def schedule(spec: Spec, cut: float, planner: Planner) -> tuple[int, ...]:
    """Counts that fall by the same number from block to block and save `cut` of the MACs.

    The first two blocks keep every token, and the last computes only what the head reads. What
    the planner itself computes counts too.

    Raises:
        PlanError: the cut is out of reach for this model.
    """
    wanted = (1 - cut) * gmacs(spec)

    def cost(counts: tuple[int, ...]) -> float:
        probe = type(planner)(counts=counts).bind(spec)
        return gmacs(spec, probe)

    floor = spec.prefix + max(1, round(_FLOOR * spec.patches))
    low, high = 0.0, float(spec.patches)
    if cost(_falling(spec, high, floor)) > wanted:
        most = 1 - cost(_falling(spec, high, floor)) / gmacs(spec)
        raise PlanError(f"cut must be at most {most:.3f} for {spec.name}, got {cut}")
    for _ in range(40):
        middle = (low + high) / 2
        if cost(_falling(spec, middle, floor)) > wanted:
            low = middle
        else:
            high = middle
    return _falling(spec, high, floor)


def _falling(spec: Spec, step: float, floor: int) -> tuple[int, ...]:
    steps = (max(0, layer - _WHOLE + 1) for layer in range(spec.depth - 1))
    return (*(max(floor, round(spec.tokens - step * k)) for k in steps), spec.head_tokens)
