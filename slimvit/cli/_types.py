"""Argument types: each says the rule and the value when a value breaks it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from slimvit.errors import UsageError


def whole_number(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """A whole number within bounds: least <= value <= most."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            rule = f"<= {most}" if value > most else f">= {least}"
            raise argparse.ArgumentTypeError(f"must be a whole number {rule}, got {text!r}")
        return value

    return parse


def number(
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> Callable[[str], float]:
    """A finite number within bounds: above < value < below, least <= value <= most."""
    bounds = [(">", above), (">=", least), ("<", below), ("<=", most)]
    rule = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if math.isfinite(bound))

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = above < value < below and least <= value <= most
        if not (inside and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be a finite number {rule}, got {text!r}")
        return value

    return parse


def kept_counts(text: str) -> tuple[int, ...]:
    """Kept counts n1,…,nL, each at least 1, not growing; 111x7 stands for seven times 111."""
    from slimvit.bench import parse_keep

    try:
        return parse_keep(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def ratios(text: str) -> list[float]:
    """Shares such as 0.7,0.5: each in (0, 1]."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"must be shares in (0, 1], such as 0.7,0.5, got {text!r}")
    return values


def block_numbers(text: str) -> list[int]:
    """Blocks counted from 0, such as 3,6,9."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [-1]
    if min(values) < 0:
        raise argparse.ArgumentTypeError(
            f"must be blocks counted from 0, such as 3,6,9, got {text!r}"
        )
    return values


def json_file(text: str) -> Path:
    """A path; - is stdout."""
    return Path("/dev/stdout" if text == "-" else text)
