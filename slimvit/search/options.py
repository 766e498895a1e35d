"""The options of a search: Python's own numbers, checked."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slimvit import models
from slimvit.errors import UsageError
from slimvit.masks import SEMANTICS, Masks
from slimvit.models import Spec
from slimvit.search.algorithm1 import Settings
from slimvit.search.scores import SCORES, Score


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
        return f"cut {self.cut}" if self.cut is not None else f"speed-up {self.speedup}"


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
    value = _number(name, given[name])
    if name == "cut" and not 0 < value < 1:
        raise UsageError(f"cut must lie between 0 and 1, got {value}")
    least = 1 if name == "speedup" else 0
    if name != "cut" and not (math.isfinite(value) and value > least):
        raise UsageError(f"{name} must be finite and above {least}, got {value}")
    return Budget(**{name: value})


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
    if isinstance(score, str) and score not in SCORES:
        raise UsageError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    lr = _number("lr", lr)
    if not (math.isfinite(lr) and lr > 0):
        raise UsageError(f"lr must be finite and above 0, got {lr}")
    if semantics not in SEMANTICS:
        raise UsageError(f"semantics must be one of {', '.join(SEMANTICS)}, got {semantics!r}")
    return Settings(
        score=SCORES[score] if isinstance(score, str) else score,
        tolerance=budget.tolerance,
        counts=budget.counts,
        granularity=whole("granularity", granularity, 1, " token"),
        epochs=whole("epochs", epochs, 0),
        lr=lr,
        semantics=semantics,
        seed=whole("seed", seed),
    )


def whole(name: str, value: Any, least: int | None = None, unit: str = "") -> int:
    """`value` as a whole number.

    Raises:
        UsageError: it is none, or below `least`.
    """
    try:
        found = operator.index(value)
    except TypeError:
        raise UsageError(f"{name} must be a whole number, got {value!r}") from None
    if least is not None and found < least:
        raise UsageError(f"{name} must be at least {least}{unit}, got {found}")
    return found


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be a number, got {value!r}") from None


def _counts(values: Sequence[int], spec: Spec) -> tuple[int, ...]:
    """Kept counts n_1 … n_L that fit the model and end with what the head reads."""
    counts = tuple(whole("each of counts", value) for value in values)
    models.check_masks(Masks.from_counts(counts, spec.grid, spec.prefix), spec)
    if counts[-1] != spec.head_tokens:
        raise UsageError(
            f"counts must end with {spec.head_tokens}, what the head reads of the last block, "
            f"got {counts[-1]}"
        )
    return counts
