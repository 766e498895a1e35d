"""Processes that are forked after OpenMP has computed: its threads are not forked along."""

from __future__ import annotations

import functools
import os

import torch


@functools.cache
def guard_forks() -> None:
    """From now on forked processes compute on one thread, where more would wait for ever."""
    os.register_at_fork(after_in_child=_one_thread)


def _one_thread() -> None:
    torch.set_num_threads(1)
