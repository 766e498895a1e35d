"""Copies of models, in whatever state they are."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def copied(model: M) -> M:
    """A deep copy that may be trained, of a model that may hold what `copy.deepcopy` refuses.

    That is tensors that hooks compute from parameters, as torch.nn.utils.prune does: the copy's
    hooks compute them anew. In inference mode, too, the copy's parameters are ordinary ones.
    """
    with torch.inference_mode(False):
        computed = {
            id(value): value.detach().clone()
            for module in model.modules()
            for value in vars(module).values()
            if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf
        }
        return copy.deepcopy(model, computed)
