"""How each block of a plan chooses, as compiled kernels read it."""

from __future__ import annotations

from slimvit.dynamic import Planner
from slimvit.ops import ChooserParts, SelectorParts, why_not_chosen


def choosers_of(plan: Planner, backend: str) -> list[ChooserParts | None] | str:
    """How each block of a bound plan chooses, or the selector before it; or why no kernel does.

    None stands for a block that keeps the first of its tokens.

    Args:
        plan: a bound plan.
        backend: "cpu", "triton" or "cuda".
    """
    reason = f"{backend} has no kernels for the planner {plan.kind or type(plan).__name__} yet"
    found: list[ChooserParts | None] = []
    for layer, (m, n) in enumerate(zip(plan.alive, plan.counts, strict=True)):
        chooses, selects = plan.prefix < n < m, layer in plan.acts_before
        parts = plan.parts(layer) if chooses or selects else None
        if selects != isinstance(parts, SelectorParts) or (chooses and (selects or parts is None)):
            return reason
        found.append(parts)
    return why_not_chosen(found, backend) or found
