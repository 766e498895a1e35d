"""How long to time and on how many CPU threads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from slimvit.checks import number, whole
from slimvit.errors import UsageError

MOST_THREADS = max(256, 4 * (os.cpu_count() or 1))
"""OpenMP ends the process where it cannot start as many as it is asked for."""


class Timing(NamedTuple):
    """Figures for each row, the length of its turn in a round, and its CPU threads."""

    rounds: int
    seconds: float
    threads: int


def read_timing(rounds: int, seconds: float, threads: int | None) -> Timing:
    """The same in plain numbers; torch's own number of threads for None.

    Raises:
        UsageError: one is out of range.
    """
    threads = torch.get_num_threads() if threads is None else whole("threads", threads, 1)
    if threads > MOST_THREADS:
        raise UsageError(f"threads must be at most {MOST_THREADS} here, got {threads}")
    return Timing(whole("rounds", rounds, 1), number("seconds", seconds, above=0), threads)


@contextlib.contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """Let torch compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
