"""Weights that are drawn alike wherever they are drawn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from PyTorch's CPU generator as if it had just been seeded; then it is as it was.

    Modules that are made inside are made on the CPU. Generators of GPUs are not touched, which
    `torch.manual_seed` would seed as well.
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        with torch.device("cpu"):
            yield
    finally:
        generator.set_state(state)
