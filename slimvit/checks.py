"""Checks of plain arguments: Python's own values, or one error with the name, rule and value."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from slimvit.errors import SlimvitError, UsageError

if TYPE_CHECKING:
    import torch


def whole(
    name: str, value: Any, least: int | None = None, error: type[SlimvitError] = UsageError
) -> int:
    """`value`, Python's or NumPy's or a tensor's whole number, as an int.

    Raises:
        error: it is none, or below `least`.
    """
    try:
        found = operator.index(value)
    except TypeError:
        raise error(f"{name} must be a whole number, got {value!r}") from None
    if least is not None and found < least:
        raise error(f"{name} must be at least {least}, got {found}")
    return found


def wholes(
    name: str, values: Any, least: int | None = None, error: type[SlimvitError] = UsageError
) -> tuple[int, ...]:
    """A sequence of whole numbers, as ints.

    Raises:
        error: it is none, or one of them is below `least`.
    """
    found = _each(name, values, "whole numbers", error)
    return tuple(whole(f"each of {name}", value, least, error) for value in found)


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    error: type[SlimvitError] = UsageError,
) -> float:
    """`value` as a finite float, above < value < below, least ≤ value ≤ most.

    Raises:
        error: it is none, or out of bounds.
    """
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        raise error(f"{name} must be a number, got {value!r}") from None
    rules = (
        ("above", above, above is None or found > above),
        ("at least", least, least is None or found >= least),
        ("below", below, below is None or found < below),
        ("at most", most, most is None or found <= most),
    )
    if not (math.isfinite(found) and all(holds for _, _, holds in rules)):
        words = ["finite", *(f"{word} {bound:g}" for word, bound, _ in rules if bound is not None)]
        rule = ", ".join(words[:-1]) + " and " * (len(words) > 1) + words[-1]
        raise error(f"{name} must be {rule}, got {value}")
    return found


def numbers(
    name: str, values: Any, *, error: type[SlimvitError] = UsageError, **bounds: float
) -> tuple[float, ...]:
    """A sequence of finite numbers, each in the `bounds` of `number`, as floats.

    Raises:
        error: it is none, or one of them is out of bounds.
    """
    found = _each(name, values, "numbers", error)
    return tuple(number(f"each of {name}", value, error=error, **bounds) for value in found)


def one_of(
    name: str, value: Any, known: Iterable[str], error: type[SlimvitError] = UsageError
) -> Any:
    """`value`, which is one of the known names.

    Raises:
        error: it is not.
    """
    known = tuple(known)
    if not (isinstance(value, str) and value in known):
        raise error(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return value


def some_of(name: str, values: Any, known: Iterable[str]) -> tuple[str, ...]:
    """A sequence of known names.

    Raises:
        UsageError: it is none, or one of them is unknown.
    """
    found, known = _each(name, values, "names", UsageError), tuple(known)
    return tuple(one_of(f"each of {name}", value, known) for value in found)


def iterable(name: str, value: Any) -> Any:
    """`value`, which gives batches one after another; none is taken here.

    Raises:
        UsageError: it gives nothing, as None or a model.
    """
    if not any(hasattr(type(value), method) for method in ("__iter__", "__getitem__")):
        raise UsageError(f"{name} must give batches one by one, got {type(value).__name__}")
    return value


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as users name it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _each(name: str, values: Any, what: str, error: type[SlimvitError]) -> Iterator[Any]:
    """What a sequence other than text holds."""
    try:
        if isinstance(values, (str, bytes)):
            raise TypeError
        return iter(values)
    except TypeError:
        raise error(f"{name} must be {what} in a list, got {values!r}") from None
