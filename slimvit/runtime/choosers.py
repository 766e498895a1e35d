"""How each block of a plan chooses, as compiled kernels read it."""

from __future__ import annotations

from slimvit.dynamic import Planner
from slimvit.ops import ChooserParts, why_not_chosen


def choosers_of(plan: Planner, backend: str) -> list[ChooserParts | None] | str:
    """How each block of a bound plan chooses, None where it keeps the first; or why no kernel does.

    Args:
        plan: a bound plan.
        backend: "cpu", "triton" or "cuda".
    """
    reason = f"{backend} has no kernels for the planner {plan.kind or type(plan).__name__} yet"
    if plan.acts_before:
        return reason
    found: list[ChooserParts | None] = []
    for layer, (m, n) in enumerate(zip(plan.alive, plan.counts, strict=True)):
        chooses = plan.prefix < n < m
        found.append(plan.parts(layer) if chooses else None)
        if chooses and found[-1] is None:
            return reason
    return why_not_chosen(found, backend) or found
