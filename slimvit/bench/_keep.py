"""Kept counts as text: 141,141,131,121,111x7,1."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from slimvit.errors import UsageError

_TERM = re.compile(r"(\d{1,9})(?:x(\d{1,4}))?")  # numbers that lists and tensors can have


def parse_keep(text: str) -> tuple[int, ...]:
    """Kept counts n_1 … n_L, prefix tokens included; `111x7` stands for seven times 111.

    Raises:
        UsageError: a term is neither a count nor a repeated count.
    """
    counts: list[int] = []
    for term in text.split(","):
        match = _TERM.fullmatch(term.strip())
        if match is None:
            raise UsageError(f"kept counts look like 141,141,131,111x7,1, got {term.strip()!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    if not counts:
        raise UsageError(f"kept counts look like 141,141,131,111x7,1, got {text!r}")
    return tuple(counts)


def format_keep(counts: Sequence[int]) -> str:
    """Text that `parse_keep` reads back; three and more equal counts are one term."""
    terms: list[str] = []
    for count, run in itertools.groupby(counts):
        times = len(list(run))
        terms += [f"{count}x{times}"] if times > 2 else [str(count)] * times
    return ",".join(terms)
