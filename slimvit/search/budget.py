"""Budgets other than a tolerance: MACs saved, or speed gained as measured on this device."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from slimvit import macs, models
from slimvit.dynamic import Planner
from slimvit.errors import DataError, SearchError
from slimvit.masks import Masks
from slimvit.models import Spec
from slimvit.runtime import accelerate
from slimvit.search.reduce import all_max, from_rank, rank, world_size

_TRIALS = 10
_WIDEST, _TIGHTEST = 1.0, 1e-5


def bisect(
    search: Callable[[float], Masks], reached: Callable[[Masks], bool], wanted: str
) -> Masks:
    """The masks of the smallest tried tolerance that reach the budget.

    The range of tolerances is halved geometrically, ten times.

    Args:
        search: masks for a tolerance.
        reached: whether masks meet the budget.
        wanted: the budget in words, for the error.

    Raises:
        SearchError: even the loosest tolerance does not reach it.
    """
    best = search(_WIDEST)
    if not reached(best):
        raise SearchError(f"{wanted} is out of reach: tolerance {_WIDEST} keeps {best.counts}")
    low, high = _TIGHTEST, _WIDEST
    for _ in range(_TRIALS):
        middle = math.sqrt(low * high)
        masks = search(middle)
        if reached(masks):
            best, high = masks, middle
        else:
            low = middle
    return best


def uniform_counts(spec: Spec, fraction: float, semantics: str) -> tuple[int, ...]:
    """The largest equal count in every block but the last that still cuts `fraction` of the MACs.

    Raises:
        SearchError: even keeping only the prefix tokens cuts less.
    """
    most = 0.0
    for n in range(spec.tokens, spec.prefix - 1, -1):
        counts = (n,) * (spec.depth - 1) + (spec.head_tokens,)
        masks = Masks.from_counts(counts, spec.grid, spec.prefix, semantics=semantics)
        saved = macs.cut(spec, masks)
        if saved >= fraction:
            return counts
        most = max(most, saved)
    raise SearchError(
        f"cut {fraction} is out of reach by uniform pruning: "
        f"semantics {semantics} can cut {math.floor(1000 * most) / 1000:.3f}"
    )


def measure_speedup(
    model: nn.Module, masks: Masks | Planner, images: Tensor | None, rounds: int = 7
) -> float:
    """Images per second of the slimmed model over the dense one, on this device, in one run.

    Dense and slim alternate; the median ratio of the rounds is returned. Under torch.distributed
    the first process that has images measures, and all get what it found.

    Args:
        model: the dense model.
        masks: kept sets, or a dynamic plan.
        images: one batch, [B, C, H, W], of the size to be fast at, on any device; None in a
            process that has none.
        rounds: counted rounds after one that warms up.

    Raises:
        DataError: no process has images.
    """
    world = world_size()
    has = all_max(0 if images is None else world - rank())
    if not has:
        raise DataError("no images to measure a speed-up with")
    source = world - has
    here = images is not None and rank() == source
    return from_rank(source, _speedup(model, masks, images, rounds) if here else 0.0)


def _speedup(model: nn.Module, masks: Masks | Planner, images: Tensor, rounds: int) -> float:
    images = images.to(next(model.parameters()).device)
    shape = models.spec(model)
    dense = accelerate(model, Masks.dense(shape.depth, shape.grid, shape.prefix))
    slim = accelerate(model, masks)
    ratios = [_seconds(dense, images) / _seconds(slim, images) for _ in range(rounds + 1)][1:]
    return statistics.median(ratios)


def _seconds(model: nn.Module, images: Tensor, at_least: float = 0.2) -> float:
    """Seconds a batch, over as many as fill `at_least` seconds."""
    count, start = 0, time.perf_counter()
    while True:
        model(images)
        count += 1
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        elapsed = time.perf_counter() - start
        if elapsed >= at_least:
            return elapsed / count
