"""How each block of a plan chooses, as compiled kernels read it."""

from __future__ import annotations

from slimvit.dynamic import Planner
from slimvit.ops import ChooserParts, SelectorParts, why_not_chosen


def choosers_of(plan: Planner, backend: str) -> list[ChooserParts | None] | str:
    """How each block of a bound plan chooses, None where it keeps the first; or why no kernel does.

    Ahead of a block a selector may act, and the block then keeps all or the first.

    Args:
        plan: a bound plan.
        backend: "cpu", "triton" or "cuda".
    """
    reason = f"{backend} has no kernels for the planner {plan.kind or type(plan).__name__} yet"
    if plan.acts_before and backend == "cpu":
        return reason
    found: list[ChooserParts | None] = []
    for layer, (m, n) in enumerate(zip(plan.alive, plan.counts, strict=True)):
        chooses, acts = plan.prefix < n < m, layer in plan.acts_before
        found.append(plan.parts(layer) if chooses or acts else None)
        selects = isinstance(found[-1], SelectorParts)
        if (chooses and (acts or found[-1] is None)) or acts != selects:
            return reason
    return why_not_chosen(found, backend) or found
