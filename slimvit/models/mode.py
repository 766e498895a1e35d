"""In which modes models compute: evaluation mode, autocast, inference mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from slimvit.errors import UsageError


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode; then each of its modules is in the mode in which it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextlib.contextmanager
def own_precision() -> Iterator[None]:
    """Models compute in their own precision, be autocast on around the call or not."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def refuse_inference_mode(what: str) -> None:
    """Refuse to train where no gradient can be had.

    Raises:
        UsageError: torch.inference_mode is on.
    """
    if torch.is_inference_mode_enabled():
        raise UsageError(f"{what} trains: call it outside torch.inference_mode()")
