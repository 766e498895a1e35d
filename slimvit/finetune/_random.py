"""The random numbers of a run: of its own seed, the caller's generators as they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Give Python's, numpy's and PyTorch's generators their states back, and a GPU `device`'s."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed these generators and no other; augmentation and drop path draw from them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
