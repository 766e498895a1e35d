"""The shares of SPViT's stages that meet a target latency, by a table and as measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from slimvit.bench._latency import LatencyTable, falls
from slimvit.bench._rounds import measure
from slimvit.bench._timing import cpu_threads, read_timing
from slimvit.checks import number, whole
from slimvit.dynamic import SPViT
from slimvit.errors import PlanError
from slimvit.export import sample_images
from slimvit.models import Spec, spec
from slimvit.runtime import accelerate

_LEAST, _MOST = 0.3, 0.999
"""Bounds of what one stage keeps of what it receives."""


def keep_for_latency(
    table: LatencyTable, shape: Spec, target_ms: float, stages: Sequence[int] | None = None
) -> SPViT:
    """The plan whose stages each keep the same share of what they receive and that takes so long.

    Args:
        table: measured with this model.
        shape: the model's.
        target_ms: wanted latency of a batch, in milliseconds.
        stages: blocks that selectors stand before; None for SPViT's.

    Returns:
        The bound plan nearest to the target by the table.

    Raises:
        UsageError: the target is no number, or the table of another model.
        PlanError: the target is out of reach, or by the table pruning makes nothing faster.
    """
    table.check(shape)
    target_ms = number("target_ms", target_ms)
    powers = falls(shape) if stages is None else range(1, len(stages) + 1)

    def plan(share: float) -> SPViT:
        return SPViT([share**power for power in powers], stages=stages).bind(shape)

    fastest, slowest = table.predict(plan(_LEAST)), table.predict(plan(_MOST))
    if fastest >= slowest:
        raise PlanError(
            f"by the latency table pruning makes {shape.name} no faster ({slowest:.3g} ms to "
            f"{fastest:.3g} ms): measure it again while the machine is idle"
        )
    if not fastest <= target_ms <= slowest:
        raise PlanError(
            f"target latency must lie between {fastest:.3g} and {slowest:.3g} ms, within reach of "
            f"{shape.name} by the table of {table.backend} ({table.precision}, batch "
            f"{table.batch}, {table.threads} threads), got {target_ms:.3g} ms"
        )
    low, high = _LEAST, _MOST
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if table.predict(plan(middle)) > target_ms else (middle, high)
    return min(plan(low), plan(high), key=lambda p: abs(table.predict(p) - target_ms))


def plan_for_latency(
    model: nn.Module,
    table: LatencyTable,
    target_ms: float,
    *,
    stages: Sequence[int] | None = None,
    tries: int = 3,
    within: float = 0.03,
    seconds: float = 0.3,
) -> tuple[SPViT, float]:
    """The plan that meets a target as measured: by the table, then corrected by what it took.

    Args:
        model: the dense model.
        table: measured with it.
        target_ms: wanted latency of a batch, in milliseconds.
        stages: blocks that selectors stand before; None for SPViT's.
        tries: plans to measure at most.
        within: relative distance from the target that ends the search.
        seconds: length of a turn of timing.

    Returns:
        The plan, untrained, and what it took, in milliseconds at the table's pace: the nearest of
        those measured.

    Raises:
        UsageError: a number is out of range.
        PlanError: the target is out of reach.
    """
    tries, within = whole("tries", tries, 1), number("within", within, least=0)
    seconds = number("seconds", seconds, above=0)
    shape, found, aim = spec(model), [], target_ms
    plan = keep_for_latency(table, shape, target_ms, stages)
    for _ in range(tries):
        took = measure_latency(model, plan, table, seconds=seconds).at_pace_ms
        found.append((plan, took))
        if abs(took / target_ms - 1) <= within:
            break
        aim += target_ms - took
        try:
            plan = keep_for_latency(table, shape, aim, stages)
        except PlanError:  # of the corrected aim: the target itself was within reach
            break
    return min(found, key=lambda pair: abs(pair[1] - target_ms))


class Latency(NamedTuple):
    """What a slimmed model takes for a batch, in milliseconds.

    Attributes:
        ms: as measured, the median of the rounds.
        dense_ms: the unpruned model, in turn with it.
        at_pace_ms: the share of the unpruned model's that it takes, times the table's: what it
            takes while the device runs as fast as it did for the table. Neighbours and clocks move
            both models alike.
    """

    ms: float
    dense_ms: float
    at_pace_ms: float


def measure_latency(
    model: nn.Module, plan: SPViT, table: LatencyTable, *, seconds: float = 0.3
) -> Latency:
    """What a batch takes through the accelerated model, as the table was measured.

    Args:
        model: the dense model; weights make no difference.
        plan: what prunes it.
        table: says how: device, back end, precision, batch, threads and rounds.
        seconds: length of a turn.

    Raises:
        UsageError: `seconds`, or a number of the table, is out of range.
    """
    timing = read_timing(table.rounds, seconds, table.threads)
    options = {"backend": table.backend, "precision": table.precision}
    fast = [accelerate(model, each, **options) for each in (plan, SPViT((1.0,)))]
    shape = spec(model)
    device = next(model.parameters()).device
    images = sample_images((shape.in_chans, *shape.image_size), table.batch).to(device)
    with cpu_threads(timing.threads):
        found = measure([fast], [images], **timing._asdict())
    slim, dense = found.rates[0]
    share = statistics.median(d / s for s, d in zip(slim, dense, strict=True))
    took = (1000 * table.batch / statistics.median(rates) for rates in (slim, dense))
    return Latency(*took, share * table.dense_ms)
