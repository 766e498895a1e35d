"""One run: prepare every row, refuse those that answer wrong, time the rest in turn."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from slimvit.bench import _machine
from slimvit.bench._referee import Referee
from slimvit.bench._report import Report, Row
from slimvit.bench._rounds import measure
from slimvit.bench._runtimes import (
    RUNTIMES,
    Runtime,
    Setting,
    Slimvit,
    SlimvitStatic,
    Workload,
)
from slimvit.bench._timing import cpu_threads, read_timing
from slimvit.checks import one_of, some_of, whole
from slimvit.dynamic import Planner
from slimvit.errors import MismatchError, SlimvitError, UsageError
from slimvit.export import sample_images
from slimvit.macs import gmacs, mean_gmacs
from slimvit.masks import Masks
from slimvit.models import copied, spec
from slimvit.runtime import PRECISIONS, apply_masks

_log = logging.getLogger("slimvit")
_Ready = tuple[Runtime, Row]
_Group = list[_Ready]


def bench(
    model: nn.Module,
    masks: Masks | Planner | str | os.PathLike[str],
    *,
    batch: int = 8,
    precision: str = "float32",
    backend: str = "auto",
    against: Sequence[str] | None = None,
    threads: int | None = None,
    rounds: int = 10,
    seconds: float = 1.0,
    images: Tensor | None = None,
    tell: Callable[[str], object] = _log.info,
) -> Report:
    """Images per second of the dense and the slimmed model in every runtime, in alternating rounds.

    Rows: slimvit dense (masks that keep everything) and slim; with a dynamic plan also static masks
    of the same counts; dense models in torch and torch.compile; dense and exported slim models in
    ONNX Runtime and OpenVINO. Each takes float32 images and gives float32 logits, one batch at a
    time, with the same number of threads.

    Args:
        model: dense timm model in eval mode; its device is where everything runs. Not changed.
        masks: kept sets, a dynamic plan, or the path of a file with either.
        batch: images a call.
        precision: "float32", "bfloat16" or "float16". ONNX Runtime computes in float32 always.
        backend: slimvit's back end, or "auto".
        against: names out of RUNTIMES, each of which must work; None takes all that do.
        threads: CPU threads of every runtime; None for torch's own number.
        rounds: figures for each row, of which median, min and max are told.
        seconds: length of a row's round.
        images: to be timed, [M, C, H, W], floating point and normalised, at least one batch: every
            round takes the next batch, what is left over stays. None for one batch of fixed random
            ones, with which every row is verified in any case. Where each image keeps a number of
            its own, speed and cut depend on them.
        tell: called with a line whenever a row is ready to be timed; compiling takes a while.

    Returns:
        Rows, ratios, and what was left out.

    Raises:
        UsageError: an argument is out of range, a runtime unknown, `masks` are nothing of these.
        SlimvitError: a runtime that was asked for does not work here; where only its slimmed model
            cannot be exported, as of thresholds, that row alone is left out.
        MismatchError: a runtime's logits or kept tokens do not match the float32 reference.
        MasksError, PlanError: the masks or the plan do not fit the model.
    """
    batch, timing = whole("batch", batch, 1), read_timing(rounds, seconds, threads)
    one_of("precision", precision, PRECISIONS)
    against = None if against is None else some_of("against", against, RUNTIMES)
    shape, device = spec(model), next(model.parameters()).device
    setting = Setting(device, batch, precision, timing.threads, backend)
    model = copied(model).float().eval()
    masks = apply_masks(model, masks).kept
    sample = sample_images((shape.in_chans, *shape.image_size), batch).to(device)
    batches = [sample] if images is None else _batches(images, sample, timing.rounds)
    with (
        cpu_threads(timing.threads),
        TemporaryDirectory(prefix="slimvit-bench-") as folder,
    ):
        work = Workload(model, masks, sample, Path(folder))
        executed = mean_gmacs(shape, masks, work.network(True), batches)
        groups, left_out = _prepare(work, setting, against, tell)
        calls = [[runtime for runtime, _ in group] for group in groups]
        measured = measure(calls, batches, **timing._asdict())
    for group, rates in zip(groups, measured.rates):
        for (_, row), row_rates in zip(group, rates):
            row.rates = row_rates
    return Report(
        model=shape.name,
        device=str(device),
        device_name=_machine.device_name(device),
        threads=timing.threads,
        batch=batch,
        precision=precision,
        kept=masks.counts,
        cut=1 - executed / gmacs(shape),
        rows=[row for group in groups for _, row in group],
        left_out=left_out,
        rounds=timing.rounds,
        seconds=timing.seconds,
        rejected=measured.rejected,
        disturbed=measured.disturbed,
        best_share=measured.best_share,
        versions=_machine.versions(),
        commit=_machine.commit(),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        dense_gmacs=gmacs(shape),
        peaks=_machine.peaks(device, timing.threads),
        images=0 if images is None else sum(map(len, batches)),
    )


def _batches(images: Tensor, sample: Tensor, rounds: int) -> list[Tensor]:
    """As many batches of `images` as rounds can take, each like `sample`."""
    sides = ", ".join(map(str, sample.shape[1:]))
    fits = isinstance(images, Tensor) and images.is_floating_point()
    if not fits or images.shape[1:] != sample.shape[1:]:
        found = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        dtype = f", {images.dtype}" if isinstance(images, Tensor) else ""
        raise UsageError(f"images must be [M, {sides}], floating point, got {found}{dtype}")
    batch = len(sample)
    if len(images) < batch:
        raise UsageError(f"images must be at least one batch of {batch}, got {len(images)}")
    some = images[: min(len(images) // batch, rounds) * batch].to(sample)
    return [part.contiguous() for part in some.split(batch)]


def _prepare(
    work: Workload,
    setting: Setting,
    against: Sequence[str] | None,
    tell: Callable[[str], object],
) -> tuple[list[_Group], dict[str, str]]:
    """Every row that works here, ready and verified, by runtime; and why the others do not."""
    for name in against or ():
        if (reason := RUNTIMES[name].why_not(setting)) is not None:
            raise SlimvitError(f"runtime {name}: {reason}")
    referee = Referee(work)

    def row(kind: type[Runtime], pruned: bool) -> _Ready:
        start = time.perf_counter()
        runtime = kind(setting)
        runtime.prepare(work, pruned)
        found = referee.row(runtime, pruned)
        name = "dense" if not pruned else "slim" if found.plan == "static" else found.plan
        seconds = time.perf_counter() - start
        tell(f"{runtime.label} {name}: ready in {seconds:.1f} s, error {found.error:.1e}")
        return runtime, found

    groups = [[row(Slimvit, False), row(Slimvit, True)]]
    if work.plan is not None:
        groups[0].append(row(SlimvitStatic, True))
    left_out: dict[str, str] = {}
    for name in RUNTIMES if against is None else dict.fromkeys(against):
        kind = RUNTIMES[name]
        group: _Group = []
        for pruned in (False, True) if kind.prunes else (False,):
            reason = kind.why_not_slim(work) if pruned else kind.why_not(setting)
            made = reason or _attempt(row, kind, pruned)
            if not isinstance(made, str):
                group.append(made)
                continue
            impossible = pruned and reason is not None  # the dense row is worth having
            if against is not None and not impossible:
                raise SlimvitError(f"runtime {name}: {made}")
            left_out[f"{name} slim" if pruned else name] = made
            break
        if group:
            groups.append(group)
    return groups, left_out


def _attempt(
    row: Callable[[type[Runtime], bool], _Ready], kind: type[Runtime], pruned: bool
) -> _Ready | str:
    """A row, or the reason why there is none; wrong answers are raised."""
    try:
        return row(kind, pruned)
    except MismatchError:
        raise
    except Exception as error:  # a foreign runtime may fail in any way
        _log.debug("runtime %s", kind.name, exc_info=True)
        return next(iter(str(error).strip().splitlines()), repr(error))
