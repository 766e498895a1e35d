"""Weights that are drawn alike wherever they are drawn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from PyTorch's CPU generator as if it had just been seeded; then it is as it was.

    Modules that are made inside are made on the CPU, in float32. Generators of GPUs are not
    touched, which `torch.manual_seed` would seed as well.
    """
    generator = torch.default_generator
    state, dtype = generator.get_state(), torch.get_default_dtype()
    generator.manual_seed(seed)
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
        generator.set_state(state)
