"""How many tokens each block keeps, from the share of the model's work that is to be saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slimvit.checks import number, whole
from slimvit.errors import PlanError
from slimvit.macs import gmacs
from slimvit.models import Spec


@dataclass(frozen=True)
class Shape:
    """How the counts fall with depth.

    Attributes:
        whole: blocks at the start that keep every token: before them patches know too little.
        power: of the fall, above 0; 1 takes as many tokens in each block, more takes more of them
            later.
        steepest: share of its tokens that a block keeps at least, in [0, 1].

    Raises:
        PlanError: a number out of its range.
    """

    whole: int = 1
    power: float = 1.6
    steepest: float = 0.77

    def __post_init__(self) -> None:
        whole("whole", self.whole, 0, PlanError)
        number("power", self.power, above=0, error=PlanError)
        number("steepest", self.steepest, least=0, most=1, error=PlanError)


def counts_for_cut(
    spec: Spec,
    cut: float,
    planner: Callable[[tuple[int, ...]], object],
    shape: Shape | None = None,
) -> tuple[int, ...]:
    """Counts that save `cut`, falling as `shape` says, with the step that it takes.

        n_l = max(n_{l-1} − step · (k^power − (k-1)^power), steepest · n_{l-1})

    k counts the blocks after the whole ones. The last block computes only what the head reads, and
    what the planner itself computes counts too.

    Args:
        spec: the model's shape.
        cut: share of the dense model's multiply–accumulates to save, in (0, 1).
        planner: makes the planner that keeps given counts.
        shape: of the fall.

    Raises:
        PlanError: the cut is not in (0, 1), or out of reach for this model and shape.
    """
    cut = number("cut", cut, above=0, below=1, error=PlanError)
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


def share_for_cut(
    spec: Spec, cut: float, planner: Callable[[float], object], least: float = 0.05
) -> float:
    """The share for which a planner saves `cut`, or the least if that saves less.

    Args:
        spec: the model's shape.
        cut: share of the dense model's multiply–accumulates to save.
        planner: makes the planner of a share, which saves the more the less the share is.
        least: share, and more than nothing.
    """
    low, high = least, 0.999
    for _ in range(30):
        middle = (low + high) / 2
        saved = 1 - gmacs(spec, planner(middle).bind(spec)) / gmacs(spec)
        low, high = (middle, high) if saved > cut else (low, middle)
    return high


def _falling(spec: Spec, step: float, shape: Shape) -> tuple[int, ...]:
    n, counts = float(spec.tokens), []
    for layer in range(1, spec.depth):
        k = layer - shape.whole
        if k > 0:
            fall = step * (k**shape.power - (k - 1) ** shape.power)
            n = max(n - fall, shape.steepest * n)
        counts.append(max(spec.prefix + 1, round(n)))
    return (*counts, spec.head_tokens)
