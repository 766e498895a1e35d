"""The demo's dynamic planners: each digit keeps its own patches, for the masks' share of MACs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slimvit.bench import time_calls
from slimvit.demo import _digits
from slimvit.dynamic import Planner, SPViT
from slimvit.dynamic.schedule import share_for_cut
from slimvit.evaluate import Evaluation, evaluate
from slimvit.export import sample_images
from slimvit.finetune import finetune, timm_weights
from slimvit.macs import gmacs
from slimvit.masks import Masks
from slimvit.models import Spec, spec
from slimvit.runtime import accelerate, apply_masks

_TRAINED = 704  # digits are enough for the planners
HEADER = (
    "chosen",
    "GMACs",
    "patches",
    "held-out top-1, %",
    "same answer, %",
    "images/s",
    "x dense",
)


@dataclass(frozen=True)
class Way:
    """One way of choosing patches.

    Attributes:
        name: of it.
        gmacs: executed for one image.
        patches: kept, as a share of all, averaged over the blocks that receive them.
        final: held-out accuracy of the accelerated model; None for the dense one.
        images_per_second: of the accelerated model.
    """

    name: str
    gmacs: float
    patches: float
    final: Evaluation | None
    images_per_second: float


def same_share(shape: Spec, wanted: float) -> SPViT:
    """SPViT whose stages each keep the same share of what they receive and save `wanted` MACs.

    Or as many as it can: the blocks ahead of its first selector keep everything.
    """

    def plan(share: float) -> SPViT:
        return SPViT([share**i for i in (1, 2, 3)])

    return plan(share_for_cut(shape, wanted, plan)).bind(shape)


def train_spvit(
    dense: nn.Module, plan: SPViT, train: _digits.Split, *, epochs: int, progress: bool
) -> tuple[nn.Module, Planner]:
    """The model and its trained selectors. In the first epoch they learn alone, and mostly then."""
    batches = _digits.Batches(train.first(_TRAINED), 32, seed=3, training=True)
    slim = finetune(
        apply_masks(dense, plan), dense, batches, epochs=epochs, lr=2e-3, warmup_epochs=0.3,
        frozen_epochs=1, backbone_rate=0.05, progress=progress,
    ).model  # fmt: skip
    return _apart(slim, dense)


def train_dps(
    dense: nn.Module, masks: Masks, train: _digits.Split, *, epochs: int, progress: bool
) -> tuple[nn.Module, Planner]:
    """The masks' counts, each image's own patches: predictors fitted, then the model to them."""
    from slimvit.search import train_dps as fit

    # A mirrored digit is none.
    plan = fit(dense, _digits.Batches(train.first(512), 32, seed=4), masks, flip=False, epochs=4,
               progress=progress)  # fmt: skip
    batches = _digits.Batches(train.first(_TRAINED), 32, seed=5, training=True)
    slim = finetune(
        apply_masks(dense, plan), dense, batches, epochs=epochs, lr=1e-4, alpha=0.5,
        progress=progress,
    ).model  # fmt: skip
    return _apart(slim, dense)


def _apart(slim: nn.Module, dense: nn.Module) -> tuple[nn.Module, Planner]:
    tuned = copy.deepcopy(dense)
    tuned.load_state_dict(timm_weights(slim))
    return tuned, slim.plan


def compare(
    dense: nn.Module,
    chosen: dict[str, tuple[nn.Module, Masks | Planner]],
    validation: list[tuple[torch.Tensor, torch.Tensor]],
    *,
    batch: int,
    **options: Any,
) -> list[Way]:
    """Accuracy, cost and speed of the dense model and of each way, timed in alternating rounds.

    Args:
        dense: the reference.
        chosen: model and masks or plan, by name.
        validation: batches of images and labels.
        batch: images a call when timing.
        options: `backend` and `precision` of `accelerate`, `rounds` and `seconds` of timing.
    """
    shape = spec(dense)
    timing = {name: options.pop(name) for name in ("rounds", "seconds")}
    everything = Masks.dense(shape.depth, shape.grid, shape.prefix)
    pairs = {"dense": (dense, everything), **chosen}
    fast = {name: accelerate(*pair, **options) for name, pair in pairs.items()}
    images = sample_images((shape.in_chans, *shape.image_size), batch)
    images = images.to(next(dense.parameters()).device)
    times = time_calls(list(fast.values()), images, **timing)
    ways = []
    for (name, model), ms in zip(fast.items(), times, strict=True):
        kept = model.masks or model.plan
        final = None if name == "dense" else evaluate(dense, model, validation)
        rate = 1000 * batch / ms
        ways.append(Way(name, gmacs(shape, kept), _patches(kept, shape), final, rate))
    return ways


def _patches(kept: Masks | Planner, shape: Spec) -> float:
    share = sum(min(m, shape.tokens) - shape.prefix for m in kept.alive)
    return share / (shape.depth * shape.patches)


def rows(ways: list[Way], dense_top1: float) -> list[list[str]]:
    """The table under HEADER."""
    first = ways[0].images_per_second
    return [
        [
            way.name,
            f"{way.gmacs:.3f}",
            f"{100 * way.patches:.0f} %",
            f"{dense_top1 if way.final is None else way.final.top1:.1f}",
            "" if way.final is None else f"{way.final.agreement:.1f}",
            f"{way.images_per_second:.0f}",
            f"{way.images_per_second / first:.2f}",
        ]
        for way in ways
    ]
