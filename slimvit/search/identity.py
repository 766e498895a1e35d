"""What makes two searches the same one, so that one may go on where the other stopped."""

from __future__ import annotations

import hashlib
import json
import operator
import sys
from dataclasses import asdict, replace

import torch
from torch import nn

from slimvit import models
from slimvit.digests import code_digest, content
from slimvit.errors import UsageError
from slimvit.masks import Masks
from slimvit.runtime import accelerate
from slimvit.search.algorithm1 import Settings
from slimvit.search.features import Features
from slimvit.search.options import Budget
from slimvit.search.scores import Score


def of_settings(
    dense: nn.Module, settings: Settings, budget: Budget, score: str | Score
) -> dict[str, str]:
    """What is known before the images are: options, model, and for a speed-up where it is measured.

    Raises:
        UsageError: the score has no name that tells it from others.
    """
    values = asdict(replace(settings, score=None)) | asdict(budget)
    values |= {"counts": settings.counts, "score": score_name(score)}
    if not isinstance(score, str):
        code = score if hasattr(score, "__code__") else type(score)
        values["code of the score"] = code_digest(code)
    if budget.speedup is not None:
        values |= _machine(dense)
    named = {name: json.dumps(value) for name, value in values.items()}
    return named | {"model": models.spec(dense).name, "weights": _weights(dense)}


def of_images(features: Features, settings: Settings, budget: Budget) -> dict[str, str]:
    """What the images add; their batches where the result depends on them."""
    found = {"calibration images": features.fingerprint}
    if settings.epochs > 0 or budget.speedup is not None:
        found["batch size"] = str(features.batch_size)
    return found


def score_name(score: str | Score) -> str:
    """A score's own name, or where it is found.

    Raises:
        UsageError: it is found nowhere, as a lambda or a partial is not.
    """
    if isinstance(score, str):
        return score
    module, name = getattr(score, "__module__", None), getattr(score, "__qualname__", None)
    try:
        known = operator.attrgetter(name)(sys.modules[module]) is score
    except (AttributeError, KeyError, TypeError):
        known = False
    if not known:
        raise UsageError(
            "state needs a score that its name tells from others, a function at the top of a "
            f"module, got {score!r}"
        )
    return f"{module}.{name}"


def _machine(dense: nn.Module) -> dict[str, str | int]:
    shape, device = models.spec(dense), next(dense.parameters()).device
    fast = accelerate(dense, Masks.dense(shape.depth, shape.grid, shape.prefix))
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else device.type,
        "back end": fast.backend,
        "threads": torch.get_num_threads(),
    }


def _weights(dense: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, value in dense.state_dict().items():
        digest.update(name.encode())
        digest.update(content(value))
    return digest.hexdigest()
