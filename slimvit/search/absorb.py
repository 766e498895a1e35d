"""Counts for `Absorb`: to a budget that is measured, or by how images are answered."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from slimvit.dynamic import Absorb, Shape, counts_for_cut
from slimvit.errors import DataError, PlanError, SearchError, SlimvitError, UsageError
from slimvit.models import Spec, evaluating, spec
from slimvit.runtime import apply_masks
from slimvit.search.budget import measure_speedup
from slimvit.search.features import images_of
from slimvit.search.reduce import ExactMean, all_sum, rank

SHAPES = tuple(
    Shape(whole, power, steepest)
    for whole, power, steepest in itertools.product((1, 2), (1.3, 1.6, 2.0), (0.7, 0.77, 0.84))
)
_TRIALS = 6
_SURE = 2.0  # standard errors


class Trial(NamedTuple):
    """Counts that were tried, and what the images said of them.

    Attributes:
        counts: tokens that each block keeps.
        divergence: mean KL(dense ‖ slim) of the answers, in nats.
        error: standard error of its difference to the divergence of `Absorb`'s own counts; None
            where those were not tried.
    """

    counts: tuple[int, ...]
    divergence: float
    error: float | None


def fit_absorb(
    model: nn.Module,
    loader: Iterable | None = None,
    *,
    cut: float | None = None,
    speedup: float | None = None,
    shapes: Iterable[Shape] = SHAPES,
    progress: bool = True,
) -> tuple[Absorb, tuple[Trial, ...]]:
    """An `Absorb` whose counts are chosen by what the model answers, or by a measured speed.

    With images, those counts are taken among the `shapes` whose answers stay nearest to the dense
    model's: the least mean KL(dense ‖ slim). Where `Absorb`'s own shape is among them, another must
    be better by more than two standard errors of the difference: the best of many is the luckiest
    as well. Labels are not needed, nothing is trained, and every image is answered once for each
    shape. Without images `Absorb`'s own shape is taken.

    Args:
        model: a dense timm VisionTransformer; not changed.
        loader: batches of images [b, C, H, W], or tuples that begin with them; None for no images.
        cut: share of the dense multiply–accumulates to save, in (0, 1); or
        speedup: images per second over the dense model's to reach, > 1, measured on the model's
            device with the loader's batch size (1 without a loader).
        shapes: how counts may fall with depth.
        progress: show progress on stderr (rank 0 only).

    Returns:
        A plan with fixed counts, bound to the model's shape, and what was tried on the images.

    Raises:
        UsageError: neither or both of `cut` and `speedup`, or out of range.
        DataError: the loader has no images.
        SlimvitError: images are integers, or answers not finite.
        SearchError: the budget is out of reach.
    """
    if (cut is None) == (speedup is None):
        raise UsageError("give one of cut and speedup")
    if speedup is not None and not 1 < speedup < math.inf:
        raise UsageError(f"speedup must be above 1 and finite, got {speedup}")
    shape = spec(model)
    if cut is None:
        cut = _cut_for(model, shape, speedup, _first(shape, loader))
    plans = _plans(shape, cut, shapes if loader is not None else [Shape()])
    if loader is None:
        return plans[0], ()
    own = _own(shape, cut, plans)
    found = divergences(model, plans, loader, beside=own or 0, progress=progress)
    trials = [
        Trial(plan.counts, value, None if own is None else error)
        for plan, (value, error) in zip(plans, found)
    ]
    best = min(range(len(found)), key=lambda number: found[number][0])
    if own is not None and found[own][0] - found[best][0] <= _SURE * found[best][1]:
        best = own
    return plans[best], tuple(trials)


def divergences(
    model: nn.Module,
    plans: list[Absorb],
    loader: Iterable,
    *,
    beside: int = 0,
    progress: bool = True,
) -> list[tuple[float, float]]:
    """Mean KL(dense ‖ slim) of each plan over the images of a loader, in nats.

    With it the standard error of its difference to that of the plan number `beside`.
    """
    slims = [apply_masks(model, plan).eval() for plan in plans]
    mean, images = ExactMean(2 * len(plans)), 0
    bar = tqdm(images_of(loader), desc="schedules", disable=not progress or rank() != 0)
    with evaluating(model):
        for batch in bar:
            found = _divergences(model, slims, batch)
            if not found.isfinite().all():
                raise SlimvitError("the answers are not finite: no schedule can be chosen by them")
            mean.add(torch.cat([found, (found - found[:, beside, None]).square()], 1))
            images += len(found)
    images = int(all_sum(torch.tensor(images)))
    if not images:
        raise DataError("no images to choose a schedule by")
    means, squares = mean.mean().chunk(2)
    variance = (squares - (means - means[beside]).square()).clamp(min=0)
    errors = (variance / max(1, images - 1)).sqrt()
    return list(zip(means.tolist(), errors.tolist()))


@torch.inference_mode()
def _divergences(model: nn.Module, slims: list[nn.Module], images: Tensor) -> Tensor:
    """KL of each image of a batch by each plan, [b, plans]."""
    images = images.to(next(model.parameters()).device)
    wanted = model(images).double().log_softmax(1)
    return torch.stack([_divergence(wanted, slim(images)) for slim in slims], 1)


def _divergence(wanted: Tensor, logits: Tensor) -> Tensor:
    """KL of each image, [b]."""
    answers = logits.double().log_softmax(1)
    return F.kl_div(answers, wanted, log_target=True, reduction="none").sum(1)


def _own(shape: Spec, cut: float, plans: list[Absorb]) -> int | None:
    """Which of the plans has the counts of `Absorb(cut=cut)`."""
    try:
        counts = Absorb(cut=cut).bind(shape).counts
    except PlanError:
        return None
    return next((i for i, plan in enumerate(plans) if plan.counts == counts), None)


def _plans(shape: Spec, cut: float, shapes: Iterable[Shape]) -> list[Absorb]:
    """Plans of different counts that save `cut`; shapes that cannot are passed over."""
    plans: dict[tuple[int, ...], Absorb] = {}
    reason: PlanError | None = None
    for fall in shapes:
        try:
            counts = counts_for_cut(shape, cut, lambda counts: Absorb(counts=counts), fall)
        except PlanError as error:
            reason = error
            continue
        plans.setdefault(counts, Absorb(counts=counts).bind(shape))
    if not plans:
        raise reason or UsageError("shapes must not be empty")
    return list(plans.values())


def _first(shape: Spec, loader: Iterable | None) -> Tensor | None:
    """A batch to time: the loader's first, if this process has any, or one blank image."""
    if loader is None:
        return torch.zeros(1, shape.in_chans, *shape.image_size)
    return next(images_of(loader), None)


def _cut_for(model: nn.Module, shape: Spec, speedup: float, images: Tensor | None) -> float:
    """The least cut, of those tried by halving, that reaches the speed-up."""

    def reached(cut: float) -> bool:
        plan = _plans(shape, cut, [Shape()])[0]
        return measure_speedup(model, plan, images) >= speedup

    low, high = 0.0, _most(shape)
    if not reached(high):
        raise SearchError(
            f"speed-up {speedup} is out of reach: the most that can be cut is {high:.3f}"
        )
    for _ in range(_TRIALS):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def _most(shape: Spec) -> float:
    """The greatest cut, to a thousandth, that `Absorb` can reach."""
    low, high = 0.0, 1.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        try:
            _plans(shape, middle, [Shape()])
            low = middle
        except PlanError:
            high = middle
    return low
