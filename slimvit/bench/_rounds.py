"""Rounds: what is compared runs in turn, so that a machine's drift meets all of it alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

Run = Callable[[Tensor], object]
QUIET = 0.85
"""A round counts if it got this share of the CPU time that its row's best round got."""
_WARM_UP_CALLS = 3
_SYNC_SECONDS = 0.02


@dataclass(frozen=True)
class Round:
    """Images per second of one round, and CPU time over wall time times threads."""

    images_per_second: float
    cpu_share: float


@dataclass
class Measured:
    """What `measure` found.

    Attributes:
        rates: images per second, one list a group with one list a row, one figure a round.
        rejected: rounds that were thrown away because the machine was busy elsewhere.
        disturbed: rounds that count although it was: no repeats were left.
        best_share: the largest CPU share of any round.
    """

    rates: list[list[list[float]]]
    rejected: int = 0
    disturbed: int = 0
    best_share: float = 1.0


@dataclass
class _Group:
    """Rows whose ratio is wanted: rejected together, so that their rounds stay pairs."""

    runs: Sequence[Run]
    repeats: int
    calls: list[int] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    kept: list[list[Round]] = field(default_factory=list)

    def quietness(self, rounds: list[Round]) -> float:
        """The worst of the rows' CPU shares, each relative to its row's best."""
        return min(r.cpu_share / max(b, 1e-9) for r, b in zip(rounds, self.best))


def measure(
    groups: Sequence[Sequence[Run]],
    batches: Sequence[Tensor],
    *,
    rounds: int,
    seconds: float,
    threads: int,
) -> Measured:
    """Time every row in every round, group after group, round after round.

    A row's turn is one untimed call, then calls until `seconds` are over. Where the process got
    less CPU time than QUIET of what the row got at best, the group's turn is rejected and
    repeated; each group may repeat as many turns as there are rounds. On a GPU nothing is rejected.

    Args:
        groups: rows by group; a row takes the images and gives logits.
        batches: images [B, C, H, W]; every round takes the next, then the first again.
        rounds: figures wanted for each row.
        seconds: length of a row's turn.
        threads: CPU threads that every row may use.
    """

    def of_round(index: int) -> Tensor:
        return batches[index % len(batches)]

    table = [_Group(runs, repeats=rounds) for runs in groups]
    measured = Measured([])
    with torch.inference_mode():
        for group in table:
            group.calls = [_warm_up(run, batches[0]) for run in group.runs]
            group.best = [0.0] * len(group.runs)
        for index in tqdm(range(rounds), desc="rounds", unit="round", disable=None, leave=False):
            for group in table:
                group.kept.append(_turn(group, of_round(index), seconds, threads))
                _settle(group, index, measured, of_round(index), seconds, threads)
        for group in table:  # a later round may have shown that an earlier one was disturbed
            for index in range(rounds):
                _settle(group, index, measured, of_round(index), seconds, threads)
            measured.disturbed += sum(group.quietness(kept) < QUIET for kept in group.kept)
    for group in table:
        turns = [[r.images_per_second for r in kept] for kept in group.kept]
        measured.rates.append([list(row) for row in zip(*turns)])
    measured.best_share = max((max(group.best) for group in table), default=1.0)
    return measured


def _settle(
    group: _Group, index: int, measured: Measured, images: Tensor, seconds: float, threads: int
) -> None:
    """Repeat a disturbed turn while there are repeats left; the quietest attempt is kept."""
    while group.repeats and group.quietness(group.kept[index]) < QUIET:
        group.repeats -= 1
        measured.rejected += 1
        again = _turn(group, images, seconds, threads)
        group.kept[index] = max(group.kept[index], again, key=group.quietness)


def _turn(group: _Group, images: Tensor, seconds: float, threads: int) -> list[Round]:
    rounds = [
        _round(run, images, seconds, threads, calls) for run, calls in zip(group.runs, group.calls)
    ]
    group.best = [max(best, r.cpu_share) for best, r in zip(group.best, rounds)]
    return rounds


def _round(run: Run, images: Tensor, seconds: float, threads: int, calls: int) -> Round:
    run(images)  # untimed: brings its weights into cache, lets the last row's threads fall asleep
    _wait(images)
    done = 0
    cpu, wall = time.process_time(), time.perf_counter()
    while True:
        for _ in range(calls):
            run(images)
        _wait(images)
        done += calls
        elapsed = time.perf_counter() - wall
        if elapsed >= seconds:
            break
    share = (time.process_time() - cpu) / (elapsed * threads)
    if images.device.type == "cuda":
        share = 1.0
    return Round(len(images) * done / elapsed, min(share, 1.0))


def _warm_up(run: Run, images: Tensor) -> int:
    """Run a few times; the calls after which a round looks at its clock.

    A GPU works behind the caller's back: for throughput calls are queued for _SYNC_SECONDS, for
    batch 1, where latency is the question, each is waited for.
    """
    for _ in range(_WARM_UP_CALLS):
        run(images)
    _wait(images)
    if images.device.type != "cuda" or len(images) == 1:
        return 1
    start = time.perf_counter()
    run(images)
    _wait(images)
    return max(1, int(_SYNC_SECONDS / (time.perf_counter() - start)))


def _wait(images: Tensor) -> None:
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
