"""What makes two runs the same one, so that one may go on where the other stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from slimvit.data import ImageFolder
from slimvit.digests import code_digest, content, is_own
from slimvit.dynamic import Planner
from slimvit.finetune._student import plan_of

_DATA_BYTES = 5  # float64 holds the sum of what 2¹³ processes have


def of_run(
    settings: dict[str, Any], info: dict[str, Any], slim: nn.Module, dense: nn.Module
) -> dict[str, str]:
    """What the data is not in: the settings, masks or plan, and weights that a run starts from."""
    values = settings | {f"info's {key}": value for key, value in info.items()}
    named = {key: json.dumps(v, sort_keys=True, default=str) for key, v in values.items()}
    masks, plan = getattr(slim, "masks", None), plan_of(slim)
    if masks is not None:
        named["masks"] = _digest([masks.keep]) + masks.semantics
    if plan is not None:
        named["plan"] = json.dumps([plan.kind, plan.settings(), plan.counts])
        named["code of the plan"] = _code(plan)
    weights = [*slim.state_dict().values(), *dense.state_dict().values()]
    return named | {"weights": _digest(weights)}


def data_digest(loader: Iterable[Any]) -> int:
    """A digest below 2⁴⁰ of what can be told of this process's data without a random draw.

    That is the files of an ImageFolder, the tensors of a list of batches or of a TensorDataset,
    and the `targets` of any dataset.
    """
    digest = hashlib.blake2b(digest_size=_DATA_BYTES)
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, ImageFolder):
        digest.update(dataset.contents().encode())
    digest.update(_digest(_tensors(loader, dataset)).encode())
    return int.from_bytes(digest.digest(), "little")


def _tensors(loader: Iterable[Any], dataset: object) -> Iterator[Tensor]:
    if isinstance(loader, (list, tuple)):
        batches = (batch for batch in loader if isinstance(batch, (list, tuple)))
        yield from (part for batch in batches for part in batch if isinstance(part, Tensor))
    if isinstance(dataset, TensorDataset):
        yield from dataset.tensors
    try:
        yield torch.as_tensor(getattr(dataset, "targets", None))
    except (TypeError, ValueError, RuntimeError):
        return  # there are none, or they are no numbers


def _code(plan: Planner) -> str:
    classes = (cls for cls in type(plan).__mro__ if cls not in Planner.__mro__)
    return code_digest(*(cls for cls in classes if not is_own(cls)))


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for value in tensors:
        digest.update(f"{value.dtype} {list(value.shape)}".encode())
        if value.layout is torch.strided:
            digest.update(content(value))
    return digest.hexdigest()
