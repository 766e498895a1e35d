"""Fine-tuning of one block, so that fewer of its tokens serve the blocks above as well."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from slimvit.errors import SearchError
from slimvit.search.features import Features
from slimvit.search.layer import Layer
from slimvit.search.reduce import own_batches


class BlockTuner:
    """AdamW on the parameters of block t; the weights carry on from call to call.

    The input is the dense Z_{t-1}, the objective the relative error of block t+1, which stays
    frozen. Batches are shuffled alike in every process and gradients are summed over processes,
    so that the steps are those of one process.

    Args:
        layer: block t; its parameters are trained in place.
        parameters: of block t.
        lr: learning rate.
        seed: of the shuffling.

    Source: Patch Slimming (Tang et al., CVPR 2022), Algorithm 1.
    """

    def __init__(self, layer: Layer, parameters: Iterable[Tensor], *, lr: float, seed: int) -> None:
        self._layer = layer
        self._parameters = list(parameters)
        self._optimizer = torch.optim.AdamW(self._parameters, lr=lr, weight_decay=0.0)
        self._generator = torch.Generator().manual_seed(seed * 1009 + layer.index)

    def epochs(self, features: Features, n: int, count: int) -> None:
        """Train for `count` epochs with S_t = order[:n].

        Raises:
            SearchError: the loss is not finite.
        """
        self._layer.tuned = True
        own = own_batches(features.batches)
        for _ in range(count):
            for number in torch.randperm(len(own), generator=self._generator).tolist():
                self._step(features, own[number], n)

    def _step(self, features: Features, batch: int | None, n: int) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        if batch is not None:
            with torch.enable_grad():
                errors = self._layer.relative_error(features, batch, n)
                loss = errors.sum() / max(len(errors), 1)  # of an empty batch nothing
            if not math.isfinite(loss.item()):
                raise SearchError(
                    f"fine-tuning of block {self._layer.index} diverged: "
                    f"the loss is {loss.item()}, lower the learning rate"
                )
            loss.backward()
        share_gradients(self._parameters)
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()


def share_gradients(parameters: Sequence[Tensor]) -> None:
    """Sum the gradients over processes; a process without any adds zero."""
    if not dist.is_initialized():
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([g.numel() for g in grads]), strict=True):
        parameter.grad = part.view_as(parameter).clone()
