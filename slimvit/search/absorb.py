"""Counts for `Absorb`: to a budget that is measured, or by how images are answered."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from slimvit.checks import number
from slimvit.dynamic import Absorb, Shape, counts_for_cut
from slimvit.errors import DataError, PlanError, SearchError, SlimvitError, UsageError
from slimvit.models import Spec, evaluating, own_precision, spec
from slimvit.runtime import apply_masks
from slimvit.search.budget import measure_speedup
from slimvit.search.features import Peeked, images_of
from slimvit.search.reduce import ExactMean, all_sum, rank

SHAPES = tuple(
    Shape(whole, power, steepest)
    for whole, power, steepest in itertools.product((1, 2), (1.3, 1.6, 2.0), (0.7, 0.77, 0.84))
)
_TRIALS = 6
_SURE = 2.0  # standard errors
_TIMED = 3  # plans, beside Absorb's own


class Trial(NamedTuple):
    """Counts that were tried, and what the images said of them.

    Attributes:
        counts: tokens that each block keeps.
        divergence: mean KL(dense ‖ slim) of the answers, in nats; of a model without classes, the
            mean relative squared error of its features.
        error: standard error of its difference to the divergence of `Absorb`'s own counts; infinite
            of one image, None where those were not tried.
    """

    counts: tuple[int, ...]
    divergence: float
    error: float | None


@own_precision()
def fit_absorb(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
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
    as well. With `speedup` another must reach it as measured, too; where none of the best three
    does, `Absorb`'s own is taken, which has. Labels are not needed, nothing is trained, and every
    image is answered once for each shape. Without images `Absorb`'s own shape is taken.

    Args:
        model: a dense timm VisionTransformer; not changed.
        loader: batches of images [b, C, H, W], or tuples that begin with them, read once;
            None for no images.
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
        PlanError: no shape reaches the cut.
        SearchError: the speed-up is out of reach.
    """
    if (cut is None) == (speedup is None):
        raise UsageError("give one of cut and speedup")
    if cut is not None:
        cut = number("cut", cut, above=0, below=1)
    if speedup is not None:
        speedup = number("speedup", speedup, above=1)
    shape, images = spec(model), None
    loader = None if loader is None else Peeked(loader)
    if cut is None:
        blank = torch.zeros(1, shape.in_chans, *shape.image_size)
        images = blank if loader is None else loader.first
        cut = _cut_for(model, shape, speedup, images)
    if loader is None:
        return _plans(shape, cut, [Shape()])[0], ()
    plans = _plans(shape, cut, shapes)
    own = _own(shape, cut, plans)
    found = divergences(model, plans, loader, beside=own or 0, progress=progress)
    trials = [
        Trial(plan.counts, value, None if own is None else error)
        for plan, (value, error) in zip(plans, found)
    ]

    def reached(number: int) -> bool:
        return speedup is None or measure_speedup(model, plans[number], images) >= speedup

    best = _best(found, own, reached)
    plan = _plans(shape, cut, [Shape()])[0] if best is None else plans[best]
    return plan, tuple(trials)


def divergences(
    model: nn.Module,
    plans: list[Absorb],
    loader: Iterable[Any],
    *,
    beside: int = 0,
    progress: bool = True,
) -> list[tuple[float, float]]:
    """Mean divergence of each plan over the images of a loader, as in `Trial`.

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
    errors = (variance / (images - 1)).sqrt() if images > 1 else torch.full_like(means, torch.inf)
    return list(zip(means.tolist(), errors.tolist()))


@torch.inference_mode()
def _divergences(model: nn.Module, slims: list[nn.Module], images: Tensor) -> Tensor:
    """Of each image of a batch by each plan, [b, plans]."""
    parameter = next(model.parameters())
    images = images.to(parameter.device, parameter.dtype)
    divergence = _kl if model.num_classes else _error
    answers = [slim(images).double() for slim in slims]  # they refuse images of another shape
    wanted = model(images).double()
    return torch.stack([divergence(wanted, answer) for answer in answers], 1)


def _kl(wanted: Tensor, logits: Tensor) -> Tensor:
    """KL of each image, [b]."""
    answers, wanted = logits.log_softmax(1), wanted.log_softmax(1)
    return F.kl_div(answers, wanted, log_target=True, reduction="none").sum(1)


def _error(wanted: Tensor, features: Tensor) -> Tensor:
    """Relative squared error of each image, [b]."""
    return (features - wanted).square().sum(1) / wanted.square().sum(1)


def _best(
    found: list[tuple[float, float]], own: int | None, reached: Callable[[int], bool]
) -> int | None:
    """The least divergence that reaches the speed-up; `own` where none does that is surely better.

    Args:
        found: of each plan its divergence, and the standard error of its difference to `own`.
        own: number of the plan that has reached it.
        reached: whether another does; asked of the best few.
    """
    for best in sorted(range(len(found)), key=lambda plan: found[plan][0])[:_TIMED]:
        if own is not None and found[own][0] - found[best][0] <= _SURE * found[best][1]:
            break
        if reached(best):
            return best
    return own


def _own(shape: Spec, cut: float, plans: list[Absorb]) -> int | None:
    """Which of the plans has the counts of `Absorb(cut=cut)`."""
    try:
        counts = Absorb(cut=cut).bind(shape).counts
    except PlanError:
        return None
    return next((i for i, plan in enumerate(plans) if plan.counts == counts), None)


def _plans(shape: Spec, cut: float, shapes: Iterable[Shape]) -> list[Absorb]:
    """Plans of different counts that save `cut`; shapes that cannot are passed over."""
    shapes = tuple(shapes)
    if not shapes:
        raise UsageError("shapes must not be empty")
    found = (_counts(shape, cut, fall) for fall in shapes)
    plans = [Absorb(counts=counts).bind(shape) for counts in dict.fromkeys(found) if counts]
    if not plans:
        most = _most(shape, shapes)
        raise PlanError(f"cut must be at most {most:.3f} for {shape.name}, got {cut}")
    return plans


def _counts(shape: Spec, cut: float, fall: Shape) -> tuple[int, ...] | None:
    """Counts that save `cut`; None where this fall cannot."""
    try:
        return counts_for_cut(shape, cut, lambda counts: Absorb(counts=counts), fall)
    except PlanError:
        return None


def _cut_for(model: nn.Module, shape: Spec, speedup: float, images: Tensor | None) -> float:
    """The least cut, of those tried by halving, that reaches the speed-up."""

    def reached(cut: float) -> bool:
        plan = _plans(shape, cut, [Shape()])[0]
        return measure_speedup(model, plan, images) >= speedup

    low, high = 0.0, _most(shape, [Shape()])
    if not reached(high):
        raise SearchError(
            f"speed-up {speedup:g} is out of reach: Absorb's own shape cuts at most {high:.3f}"
        )
    for _ in range(_TRIALS):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def _most(shape: Spec, shapes: Sequence[Shape]) -> float:
    """The greatest cut, in whole thousandths, that one of the shapes reaches."""
    low, high = 0, 1000
    while high - low > 1:
        middle = (low + high) // 2
        reached = any(_counts(shape, middle / 1000, fall) for fall in shapes)
        low, high = (middle, high) if reached else (low, middle)
    return low / 1000
