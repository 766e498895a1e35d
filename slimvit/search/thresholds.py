"""Thresholds for `Absorb`, by which each image keeps as many patches as it takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slimvit.dynamic import Absorb
from slimvit.errors import DataError, SlimvitError, UsageError
from slimvit.macs import block_macs
from slimvit.models import block_parts, embed, own_precision, spec
from slimvit.ops import Alive, View
from slimvit.ops.spread import spread_norm
from slimvit.runtime import apply_masks
from slimvit.search.features import images_of
from slimvit.search.reduce import all_sum, rank

_HIGHEST = 2.0  # a score is at most sqrt(1) · (1 - (-1))
_HALVINGS = 40
_MARGIN = 1e-6  # of a threshold above the score that it is for: more than rounding


@own_precision()
@torch.inference_mode()
def fit_thresholds(
    model: nn.Module, plan: Absorb, loader: Iterable[Any], *, progress: bool = True
) -> Absorb:
    """Thresholds with which the images cost, on average, what a plan's counts do.

    Block after block, from the first: the threshold that leaves the block as much work, on average
    over what earlier thresholds have left of the images, as the counts do. Labels are not needed,
    nothing is trained, and every image goes through the model once.

    Args:
        model: a dense timm VisionTransformer; not changed.
        plan: whose counts are the average; thresholds of its own are not looked at.
        loader: batches of images [b, C, H, W], or tuples that begin with them. The tokens of all
            images, one block's, are held in memory.
        progress: show progress on stderr (rank 0 only).

    Returns:
        A plan with these counts and the thresholds, bound to the model's shape.

    Raises:
        UsageError: the plan is no `Absorb`, or one of another rule.
        PlanError: the counts do not fit the model, or a block ahead of the last keeps no patch.
        DataError: the loader has no images.
        SlimvitError: images are integers, or the model's numbers are not finite.
    """
    if getattr(type(plan), "choose", None) is not Absorb.choose:
        raise UsageError(f"thresholds are for Absorb, got {type(plan).__name__}")
    shape = spec(model)
    counts = plan.bind(shape).counts
    plan = Absorb(counts=counts, thresholds=[0.0] * shape.depth).bind(shape)
    slim = apply_masks(model, plan).eval()
    images = _enter(slim, loader)
    bar = tqdm(total=shape.depth, desc="thresholds", disable=not progress or rank() != 0)
    for layer in range(shape.depth):
        if plan.threshold(layer) is not None:
            values = list(plan.thresholds)
            values[layer] = _threshold(slim, layer, images)
            plan.thresholds = slim.plan.thresholds = tuple(values)
        images = [slim.block(layer, alive) for alive in images]
        bar.update()
    bar.close()
    return plan


def _enter(slim: nn.Module, loader: Iterable[Any]) -> list[Alive]:
    """Each image's tokens ahead of the first block."""
    parameter, found = next(slim.parameters()), []
    for batch in images_of(loader):
        if not len(batch):
            continue
        for x in embed(slim, batch.to(parameter.device, parameter.dtype)).split(1):
            place = torch.arange(x.shape[1], device=x.device)[None]
            found.append(Alive(x.transpose(0, 1), place))
    if not int(all_sum(torch.tensor(len(found)))):
        raise DataError("no images to find thresholds by")
    return found


def _threshold(slim: nn.Module, layer: int, images: list[Alive]) -> float:
    """The least, of those tried by halving, that leaves no more work than the counts do."""
    average, shape = slim.plan.threshold(layer), slim.plan.spec
    scores = [_scores(slim, layer, alive).sort().values for alive in images]
    broken = not all(each.isfinite().all() for each in scores)
    total, broken = all_sum(torch.tensor([len(images), int(broken)])).tolist()
    if broken:
        raise SlimvitError(f"block {layer + 1}: scores are not finite, no threshold can be found")
    wanted = total * block_macs(shape, average.after, average.before, average.before)

    def work(threshold: float) -> int:
        macs = 0
        for alive, each in zip(images, scores, strict=True):
            m = alive.x.shape[0]
            macs += block_macs(shape, m - int(torch.searchsorted(each, threshold)), m, m)
        return int(all_sum(torch.tensor(macs)))

    low, high = 0.0, _HIGHEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if work(middle) > wanted else (low, middle)
    return high * (1 + _MARGIN)


def _scores(slim: nn.Module, layer: int, alive: Alive) -> Tensor:
    """What a threshold is compared with, of an image's candidates: [candidates], on the CPU."""
    plan, block = slim.plan, block_parts(slim)[layer]
    y = spread_norm(block.norm1, alive.x, alive.spread)
    view = View(alive, block, y, plan.prefix, plan.spec.head_tokens)
    return plan.candidates_of(layer, view).cpu()
