"""Block latency against the share of kept patches, measured."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import statistics
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from slimvit.bench import _machine
from slimvit.bench._pieces import pieces
from slimvit.bench._rounds import measure
from slimvit.bench._timing import cpu_threads, read_timing
from slimvit.checks import numbers, whole
from slimvit.dynamic import SPViT
from slimvit.errors import UsageError
from slimvit.export import sample_images
from slimvit.models import Spec, spec
from slimvit.runtime import accelerate

FORMAT, VERSION = "slimvit-latency", 1
RATIOS = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
_log = logging.getLogger("slimvit")


@dataclass(frozen=True)
class Row:
    """Milliseconds for a batch of which each image has so many tokens.

    Attributes:
        keep: share of the patches.
        tokens: prefix tokens and those patches.
        block_ms: a block that keeps them all, the mean over the model's blocks in turn.
        last_ms: the last block, which keeps what the head reads.
        selector_ms: a selector of these patches, removal and package included.
    """

    keep: float
    tokens: int
    block_ms: float
    last_ms: float
    selector_ms: float


@dataclass(frozen=True)
class LatencyTable:
    """What blocks cost on one device, through one back end; medians over alternating rounds.

    Attributes:
        model, image_size: what it was measured with.
        device, device_name, threads: on what.
        backend, precision, batch: how; latencies are of whole batches.
        rounds: figures of which medians were taken.
        rows: by falling share of patches.
        rest_ms: what a whole model takes beside its blocks and selectors: embedding and head.
        dense_ms: the whole model unpruned.
        versions, commit: of the software.
    """

    model: str
    image_size: tuple[int, int]
    device: str
    device_name: str
    threads: int
    backend: str
    precision: str
    batch: int
    rounds: int
    rows: tuple[Row, ...]
    rest_ms: float
    dense_ms: float
    versions: dict[str, str]
    commit: str

    def predict(self, plan: SPViT) -> float:
        """Milliseconds of a model with this bound plan: rest + Σ blocks + Σ selectors."""
        received, stages = plan.alive, plan.plan_stages(plan.spec)
        blocks = sum(self.at(tokens, "block_ms") for tokens in received[:-1])
        selectors = sum(self.at(plan.prefix + s.before, "selector_ms") for s in stages)
        return self.rest_ms + blocks + self.at(received[-1], "last_ms") + selectors

    def at(self, tokens: int, column: str) -> float:
        """A column between the measured numbers of tokens, linearly; at the ends extended."""
        rows = self.rows[::-1]
        i = bisect_left([row.tokens for row in rows], tokens)
        a, b = rows[max(0, min(i - 1, len(rows) - 2)) :][:2]
        slope = (getattr(b, column) - getattr(a, column)) / (b.tokens - a.tokens)
        return getattr(a, column) + slope * (tokens - a.tokens)

    def to_json(self) -> dict[str, Any]:
        """Plain values: what `load` reads from a JSON file."""
        return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read what `slimvit latency-table --json` wrote.

        Raises:
            UsageError: the file is missing or no such table.
        """
        try:
            values = json.loads(Path(path).read_text())
            if (values.pop("format"), values.pop("version")) != (FORMAT, VERSION):
                raise ValueError(f"it is not {FORMAT} version {VERSION}")
            values["rows"] = tuple(Row(**row) for row in values["rows"])
            table = cls(**{**values, "image_size": tuple(values["image_size"])})
            steps = list(zip(table.rows, table.rows[1:]))
            if not steps or any(b.tokens >= a.tokens for a, b in steps):
                raise ValueError("rows must be two or more of falling tokens")
            return table
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is not a readable latency table: {error}") from error

    def check(self, shape: Spec) -> None:
        """Refuse a table of another model or image size.

        Raises:
            UsageError: it is.
        """
        if (self.model, self.image_size) != (shape.name, shape.image_size):
            raise UsageError(
                f"the latency table is of {self.model} at {self.image_size}, "
                f"the model is {shape.name} at {shape.image_size}"
            )


def latency_table(
    model: nn.Module,
    *,
    backend: str = "auto",
    precision: str = "float32",
    batch: int = 1,
    ratios: Sequence[float] = RATIOS,
    threads: int | None = None,
    rounds: int = 10,
    seconds: float = 0.1,
) -> LatencyTable:
    """Measure blocks, selectors and the whole model through the back end that would run them.

    Args:
        model: dense timm model in eval mode, of three blocks or more; its device is measured.
        backend: "torch", "cpu", "triton", "cuda", or "auto" for the fastest that works.
        precision: "float32", "bfloat16" or "float16".
        batch: images a call.
        ratios: shares of the patches in (0, 1], two or more.
        threads: CPU threads; None for torch's own number.
        rounds: figures for each row, of which the median counts.
        seconds: length of a row's turn in a round.

    Raises:
        UsageError: an argument out of range.
        SlimvitError: the back end does not run such models here.
    """
    shape, timing = spec(model), read_timing(rounds, seconds, threads)
    batch = whole("batch", batch, 1)
    if shape.depth < 3:
        raise UsageError(f"the model must have three blocks or more, got {shape.depth}")
    tokens = _tokens(ratios, shape)
    options = {"backend": backend, "precision": precision}
    probe = accelerate(model, SPViT((0.5,), stages=(0,)), **options)
    plans = [SPViT((1.0,)), SPViT([0.7**i for i in falls(shape)])]
    models = [accelerate(model, plan, **options) for plan in plans]
    device = next(model.parameters()).device
    images = sample_images((shape.in_chans, *shape.image_size), batch).to(device)
    runs = [run for n in tokens for run in pieces(probe, n, batch, shape)] + models
    times = time_calls(runs, images, **timing._asdict())
    table = LatencyTable(
        model=shape.name,
        image_size=shape.image_size,
        device=str(device),
        device_name=_machine.device_name(device),
        threads=timing.threads,
        backend=probe.backend,
        precision=precision,
        batch=batch,
        rounds=timing.rounds,
        rows=tuple(_row(n, times[3 * i : 3 * i + 3], shape) for i, n in enumerate(tokens)),
        rest_ms=0.0,
        dense_ms=times[-2],
        versions=_machine.versions(),
        commit=_machine.commit(),
    )
    rest = statistics.mean(t - table.predict(fast.plan) for t, fast in zip(times[-2:], models))
    if rest < 0:
        _log.warning(
            "rest_ms is %.3g, below 0: the machine was too busy, measure again with more rounds",
            rest,
        )
    return dataclasses.replace(table, rest_ms=rest)


def _tokens(ratios: Sequence[float], shape: Spec) -> list[int]:
    """Numbers of tokens of these shares of the patches, falling."""
    ratios = sorted(set(numbers("ratios", ratios)), reverse=True)
    if len(ratios) < 2 or not all(0 < ratio <= 1 for ratio in ratios):
        raise UsageError(f"ratios must be two or more in (0, 1], got {ratios}")
    patches = list(dict.fromkeys(max(2, round(ratio * shape.patches)) for ratio in ratios))
    if len(patches) < 2:
        raise UsageError(
            f"ratios must give two or more numbers of the {shape.patches} patches, got {ratios}, "
            f"which give {patches[0]} alone"
        )
    return [shape.prefix + number for number in patches]


def _row(tokens: int, times: Sequence[float], shape: Spec) -> Row:
    """What the `pieces` of so many tokens took."""
    chain, last, selector = times
    keep = (tokens - shape.prefix) / shape.patches
    return Row(keep, tokens, chain / (shape.depth - 2), last, selector)


def falls(shape: Spec) -> range:
    """Powers of one share that SPViT's stages keep of all patches."""
    return range(1, min(4, shape.depth - 1))


def time_calls(
    calls: Sequence[Callable[[Tensor], object]],
    images: Tensor,
    *,
    rounds: int = 10,
    seconds: float = 0.3,
    threads: int | None = None,
) -> list[float]:
    """Milliseconds of each call, the medians over alternating rounds.

    Args:
        calls: what takes the images.
        images: a batch, on the device that the calls run on.
        rounds: figures for each call.
        seconds: length of a call's turn in a round.
        threads: CPU threads; None for torch's own number.

    Raises:
        UsageError: a number is out of range.
    """
    timing, groups = read_timing(rounds, seconds, threads), [[call] for call in calls]
    with cpu_threads(timing.threads):
        found = measure(groups, [images], **timing._asdict())
    return [1000 * len(images) / statistics.median(rates) for (rates,) in found.rates]
