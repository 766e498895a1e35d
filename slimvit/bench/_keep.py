"""Kept counts as text: 141,141,131,121,111x7,1."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from slimvit.errors import UsageError

_TERM = re.compile(r"([1-9]\d{0,8})(?:x([1-9]\d{0,3}))?")  # numbers that lists and tensors can have
_RULE = "whole numbers n1,…,nL >= 1 that do not grow (111x7 for seven times 111)"


def parse_keep(text: str) -> tuple[int, ...]:
    """Kept counts n_1 … n_L, prefix tokens included; `111x7` stands for seven times 111.

    Raises:
        UsageError: a term is neither a count nor a repeated count, or they grow.
    """
    terms = [_TERM.fullmatch(term.strip()) for term in text.split(",")]
    counts = [int(term[1]) for term in terms if term for _ in range(int(term[2] or 1))]
    if None in terms or counts != sorted(counts, reverse=True):
        raise UsageError(f"kept counts must be {_RULE}, got {text!r}")
    return tuple(counts)


def format_keep(counts: Sequence[int]) -> str:
    """Text that `parse_keep` reads back; three and more equal counts are one term."""
    terms: list[str] = []
    for count, run in itertools.groupby(counts):
        times = len(list(run))
        terms += [f"{count}x{times}"] if times > 2 else [str(count)] * times
    return ",".join(terms)
