"""What is measured on a GPU, in order of importance, and what of it fits the time: no GPU here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import NamedTuple

# Seconds of a step on a large GPU, compilation included, until one of its kind has been timed.
EXPECTED = {"kernels": 12.0, "rows": 30.0, "graphs": 10.0, "max-autotune": 75.0}
KINDS = tuple(EXPECTED)
MAIN_BATCH = 256

Record = dict[str, str]


class Step(NamedTuple):
    """What is measured together.

    Attributes:
        kind: `rows` (every runtime, its launches one by one), `graphs` (CUDA graphs on all sides),
            `max-autotune` (torch.compile's slowest mode beside slimvit), or `kernels`.
        model: timm's name.
        image_size: in pixels.
        batch: images a call.
        precision: "float16", "bfloat16" or "float32".
    """

    kind: str
    model: str
    image_size: int
    batch: int
    precision: str

    def __str__(self) -> str:
        where = f"{self.image_size} px, batch {self.batch}, {self.precision}"
        return f"{self.kind}: {self.model}, {where}"


def plan(
    models: Sequence[str],
    image_sizes: Sequence[int],
    batches: Sequence[int],
    precisions: Sequence[str],
    large_batches: Sequence[int] = (1, 64),
    kinds: Sequence[str] = KINDS,
) -> list[Step]:
    """Steps, the most important first: a run that ends early has the answers that matter.

    Args:
        models: timm's names; within a tier they take turns.
        image_sizes: the first is measured at all of `batches`, the others at `large_batches`, in
            the first precision.
        batches: throughput is told first at MAIN_BATCH, or at the largest if that is not there;
            latency is at 1.
        precisions: the first is the one that matters.
        large_batches: of the other image sizes.
        kinds: which kinds to measure.
    """
    size, first, others = image_sizes[0], precisions[0], precisions[1:]
    main = MAIN_BATCH if MAIN_BATCH in batches else max(batches)
    rest = sorted(set(batches) - {main, 1}, reverse=True)
    one = [1] if 1 in batches else []
    tiers = [("rows", size, main, first)]
    tiers += [("graphs", size, b, first) for b in one]
    tiers += [("kernels", size, main, first)]
    tiers += [("rows", size, b, first) for b in one if b != main]
    tiers += [("max-autotune", size, main, first)]
    tiers += [("rows", size, main, p) for p in others]
    tiers += [("rows", size, b, first) for b in rest]
    tiers += [("rows", s, b, first) for s in image_sizes[1:] for b in large_batches]
    tiers += [("graphs", s, 1, first) for s in image_sizes[1:] if 1 in large_batches]
    tiers += [("graphs", size, b, p) for p in others for b in one]
    tiers += [("kernels", size, b, first) for b in one if b != main]
    tiers += [("kernels", size, main, p) for p in others]
    tiers += [("rows", size, b, p) for p in others for b in (*one, *rest) if b != main]
    slow = [(b, p) for p in precisions for b in (main, *one, *rest)]
    tiers += [("max-autotune", size, b, p) for b, p in slow if (b, p) != (main, first)]
    found = dict.fromkeys(
        Step(kind, model, *where) for kind, *where in tiers if kind in kinds for model in models
    )
    return list(found)


class Budget:
    """Seconds that may be spent: a step starts if it will probably end in time.

    Args:
        seconds: of the whole run.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._seen: dict[tuple[str, str], list[float]] = {}

    def expected(self, step: Step) -> float:
        """Seconds of a step: as long as those of its kind and model took, else of its kind."""
        seen = self._seen.get((step.kind, step.model))
        if seen is None:
            seen = [
                s for (kind, _), times in self._seen.items() if kind == step.kind for s in times
            ]
        return mean(seen) if seen else EXPECTED[step.kind]

    def allows(self, step: Step, elapsed: float) -> bool:
        """Whether a step may start after so many seconds."""
        return elapsed + self.expected(step) <= self.seconds

    def spent(self, step: Step, seconds: float) -> None:
        """Tell how long a step took."""
        self._seen.setdefault((step.kind, step.model), []).append(seconds)


def batches_of(steps: Iterable[Step]) -> dict[tuple[str, int, str], tuple[int, ...]]:
    """The batches of each model, image size and precision, in the order of the steps."""
    found: dict[tuple[str, int, str], dict[int, None]] = {}
    for step in steps:
        key = (step.model, step.image_size, step.precision)
        found.setdefault(key, {})[step.batch] = None
    return {key: tuple(batches) for key, batches in found.items()}


# A step's rows are found again by these; the first four say what was measured of what.
MEASURED = ("device", "commit", "source", "torch")
WHERE = ("model", "image_size", "batch", "precision")


def done(step: Step, records: Iterable[Record], facts: Record, kept: Iterable[str]) -> bool:
    """Whether a file has the step's rows, of this very code, device and torch, for these masks."""
    kept = set(kept)
    alike = [r for r in records if belongs(step, r) and all(r[k] == facts[k] for k in MEASURED)]
    return kept <= {record["kept"] for record in alike}


def belongs(step: Step, record: Record) -> bool:
    """Whether a row is one of the step's."""
    same = record.get("step", "kernels") == step.kind
    where = (step.model, str(step.image_size), str(step.batch), step.precision)
    return same and where == tuple(record[name] for name in WHERE)


def replaced(step: Step, old: Sequence[Record], new: Sequence[Record], device: str) -> list[Record]:
    """Rows of a file with the step's new rows in the place of those from the same device."""
    kept = {record["kept"] for record in new}
    return [
        record
        for record in old
        if not (belongs(step, record) and record["device"] == device and record["kept"] in kept)
    ] + list(new)
