"""The options of a search: Python's own numbers, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, ParamSpec, TypeVar

from slimvit import models
from slimvit.checks import number, one_of, whole, wholes
from slimvit.errors import UsageError
from slimvit.masks import SEMANTICS, Masks
from slimvit.models import Spec
from slimvit.search.algorithm1 import Settings
from slimvit.search.scores import SCORES, Score

_BOUNDS = {
    "tolerance": {"above": 0},
    "cut": {"above": 0, "below": 1},
    "speedup": {"above": 1},
}
_MOST_SEED = 2**53  # a thousandfold of it, for each block its own, is a seed of torch's as well


P = ParamSpec("P")
R = TypeVar("R")


def options_of(function: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Decorates a shorter call of `function`: editors and type checkers are told its arguments."""

    def decorate(call: Callable[..., R]) -> Callable[P, R]:
        returned = signature(call).return_annotation
        call.__signature__ = signature(function).replace(return_annotation=returned)
        return call

    return decorate


@dataclass(frozen=True)
class Budget:
    """What a search is to reach: one of these."""

    tolerance: float | None = None
    cut: float | None = None
    speedup: float | None = None
    counts: tuple[int, ...] | None = None

    @property
    def wanted(self) -> str:
        """The cut or the speed-up in words."""
        return f"cut {self.cut:g}" if self.cut is not None else f"speed-up {self.speedup:g}"


def read_budget(
    spec: Spec,
    *,
    tolerance: float | None,
    cut: float | None,
    speedup: float | None,
    counts: Sequence[int] | None,
    uniform: bool,
) -> Budget:
    """The budget in plain numbers.

    Raises:
        UsageError: not exactly one is given, or it is out of range.
        MasksError: the counts do not fit the model.
    """
    given = {"tolerance": tolerance, "cut": cut, "speedup": speedup, "counts": counts}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        got = " and ".join(names) or "none"
        raise UsageError(f"give exactly one of tolerance, cut, speedup and counts, got {got}")
    if uniform and cut is None:
        raise UsageError("uniform needs a cut: with counts give equal ones")
    if counts is not None:
        return Budget(counts=_counts(counts, spec))
    (name,) = names
    return Budget(**{name: number(name, given[name], **_BOUNDS[name])})


def read_settings(
    budget: Budget,
    *,
    score: str | Score,
    granularity: int,
    epochs: int,
    lr: float,
    semantics: str,
    seed: int,
) -> Settings:
    """How to search, in plain numbers.

    Raises:
        UsageError: an option is out of range.
    """
    return Settings(
        score=read_score(score, SCORES),
        tolerance=budget.tolerance,
        counts=budget.counts,
        granularity=whole("granularity", granularity, 1),
        epochs=whole("epochs", epochs, 0),
        lr=number("lr", lr, above=0),
        semantics=one_of("semantics", semantics, SEMANTICS),
        seed=read_seed(seed),
    )


def read_seed(seed: int) -> int:
    """A seed that a seed for each block can be made of.

    Raises:
        UsageError: it is no whole number, or too large.
    """
    found = whole("seed", seed)
    if abs(found) > _MOST_SEED:
        raise UsageError(f"seed must lie between -2^53 and 2^53, got {found}")
    return found


def read_score(score: str | Score, known: Iterable[str]) -> Score:
    """A score function, or the one of a known name.

    Raises:
        UsageError: it is neither.
    """
    return score if callable(score) else SCORES[one_of("score", score, known)]


def _counts(values: Sequence[int], spec: Spec) -> tuple[int, ...]:
    """Kept counts n_1 … n_L that fit the model and end with what the head reads."""
    counts = wholes("counts", values)
    if len(counts) != spec.depth:
        raise UsageError(f"counts must be one for each of {spec.depth} blocks, got {len(counts)}")
    models.check_masks(Masks.from_counts(counts, spec.grid, spec.prefix), spec)
    if counts[-1] != spec.head_tokens:
        raise UsageError(
            f"counts must end with {spec.head_tokens}, what the head reads of the last block, "
            f"got {counts[-1]}"
        )
    return counts
