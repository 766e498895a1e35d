"""Sums over images that do not depend on how the images are spread over processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_UNIT = 2.0**40


def rank() -> int:
    """This process's number; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes that share the search; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(value: Tensor) -> Tensor:
    """`value` summed over processes, on the CPU."""
    if dist.is_initialized():
        value = value.to(_device())
        dist.all_reduce(value)
    return value.cpu()


def all_max(value: int) -> int:
    """The greatest `value` of all processes."""
    if not dist.is_initialized():
        return value
    found = torch.tensor(value, device=_device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def from_rank(source: int, value: float) -> float:
    """The `value` of process number `source`."""
    if not dist.is_initialized():
        return value
    found = torch.tensor(value, dtype=torch.float64, device=_device())
    dist.broadcast(found, source)
    return float(found)


def own_batches(count: int) -> list[int | None]:
    """For each batch of all processes, which of this process's it is; None where another has it.

    They go round the processes, past those that have no more.

    Args:
        count: batches of this process.
    """
    counts = torch.zeros(world_size(), dtype=torch.int64)
    counts[rank()] = count
    counts = all_sum(counts).tolist()
    turns = sorted((batch, owner) for owner, n in enumerate(counts) for batch in range(n))
    return [batch if owner == rank() else None for batch, owner in turns]


class ExactMean:
    """Mean of per-image values in fixed point: the same to the last bit in any order.

    Values must be below 2^20 or so in size; they are resolved to 2^-40.
    """

    def __init__(self, width: int) -> None:
        self._total = torch.zeros(width + 1, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Add the images of a batch, [b, width]."""
        fixed = (values.double().cpu() * _UNIT).round().to(torch.int64)
        self._total[:-1] += fixed.sum(0)
        self._total[-1] += len(values)

    def mean(self) -> Tensor:
        """Over all images of all processes: [width], float64."""
        total = all_sum(self._total)
        return total[:-1].double() / _UNIT / total[-1].double()


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
