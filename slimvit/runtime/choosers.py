"""How each block of a plan chooses, as compiled kernels read it."""

from __future__ import annotations

from slimvit.dynamic import Planner
from slimvit.dynamic.planner import overrides
from slimvit.ops import ChooserParts, SelectorParts, why_not_chosen


def choosers_of(plan: Planner, backend: str) -> list[ChooserParts | None] | str:
    """How each block of a bound plan chooses, or the selector before it; or why no kernel does.

    None stands for a block that keeps the first of its tokens.

    Args:
        plan: a bound plan.
        backend: "cpu", "triton" or "cuda".
    """
    kind = type(plan)
    name = plan.kind if Planner.kinds.get(plan.kind) is kind else kind.__name__
    reason = f"{backend} has no kernels for the planner {name}"
    cure = "; plain PyTorch computes it: backend torch or auto"
    known = next(cls for cls in kind.__mro__ if "parts" in vars(cls))  # who knows what kernels do
    if overrides(plan, known, "count"):
        return f"{reason}: kernels keep its counts, and it has a count of its own{cure}"
    found: list[ChooserParts | None] = []
    for layer, (m, n) in enumerate(zip(plan.alive, plan.counts, strict=True)):
        chooses, selects = plan.prefix < n < m, layer in plan.acts_before
        parts = plan.parts(layer) if chooses or selects else None
        if selects != isinstance(parts, SelectorParts) or (chooses and (selects or parts is None)):
            return reason + cure
        found.append(parts)
    return why_not_chosen(found, backend, plan.alive, plan.spec.width) or found
