"""What pruning costs in accuracy: searches, ablations and fine-tuning on real images, as a CSV.

    python benchmarks/accuracy.py --model deit_tiny_patch16_224 --checkpoint FILE \
        --data-dir IMAGES --class-map SYNSETS --calibrate 0:250 --validate 250:500

One row an experiment; a row that the CSV holds already is not run again, so that a stopped run
goes on. Ablations keep as many tokens in every block as the first experiment found, so that only
the choice of tokens differs; `uniform` keeps equally many in every block at the same cut.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from slimvit import Absorb, Masks, Planner, SPViT, __version__, apply_masks, macs, models
from slimvit.bench._machine import commit
from slimvit.data import ImageFolder, image_transform, loader
from slimvit.dynamic.schedule import share_for_cut
from slimvit.evaluate import evaluate
from slimvit.files import atomic_write
from slimvit.finetune import finetune
from slimvit.ops import Alive, Choice, absorb_tokens
from slimvit.search import Result, fit_thresholds, search, train_dps

COLUMNS = (
    *("model", "method", "score", "tolerance", "block_epochs", "finetune_epochs", "semantics"),
    *("kept", "cut", "images", "top1", "dense_top1", "agreement", "divergence"),
    *("search_seconds", "finetune_seconds", "samples", "slimvit", "commit", "date"),
)
NONE = {"epochs": 0}
dynamic_block = sys.modules["slimvit.ops.dynamic_block"]  # the package has a function of that name
FINETUNE = {"epochs": 4, "lr": 1e-5}
SPVIT = {
    "epochs": 20,
    "frozen_epochs": 10,
    "lr": 2e-3,
    "backbone_rate": 0.01,
    "class_weight": 5.0,
    "keep_weight": 30.0,
}
CUTS = (0.41, 0.47, 0.54)


@dataclass(frozen=True)
class Planned:
    """A dynamic plan in the place of what a search finds."""

    masks: Planner
    cut: float
    model: None = None


class Experiments:
    """The experiments on one model; each adds one row to the CSV."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rows = _read(args.output)
        self.model = models.create(args.model, checkpoint=args.checkpoint)
        self.samples = 0

    def images(
        self, subset: str, samples: int | None = None, training: bool = False
    ) -> ImageFolder:
        """Photographs; without labels where a model learns from the dense one."""
        return ImageFolder(
            self.args.data_dir,
            class_map=None if training else self.args.class_map,
            subset=subset,
            samples=samples,
            transform=image_transform(self.model, training=training),
        )

    def learning(self, samples: int | None = None, training: bool = False) -> ImageFolder:
        """The images of a step that learns; the row tells the number of the last such step's."""
        images = self.images(self.args.calibrate, samples, training)
        self.samples = len(images)
        return images

    def search(self, **options: object) -> tuple[Result, float]:
        calibration = loader(self.learning(self.args.samples), 16)
        start = time.perf_counter()
        result = search(self.model, calibration, **options)  # type: ignore[arg-type]
        return result, time.perf_counter() - start

    def planned(self, plan: Planner) -> tuple[Planned, float]:
        """A plan that needs no search."""
        start, spec = time.perf_counter(), models.spec(self.model)
        bound = plan.bind(spec)
        return Planned(bound, macs.cut(spec, bound)), time.perf_counter() - start

    def thresholds(self, cut: float) -> tuple[Planned, float]:
        """Absorb with thresholds found on all calibration images; the cut is what it then saves."""
        start, images = time.perf_counter(), loader(self.learning(), 25)
        plan = fit_thresholds(self.model, Absorb(cut=cut), images)
        seconds, slim = time.perf_counter() - start, apply_masks(self.model, plan).eval()
        spec = models.spec(self.model)
        executed = macs.mean_gmacs(spec, plan, slim, loader(self.images(self.args.validate), 25))
        return Planned(plan, 1 - executed / macs.gmacs(spec)), seconds

    def predicted(self, seed: int) -> tuple[Planned, float]:
        """DPS trained on all calibration images."""
        start, spec = time.perf_counter(), models.spec(self.model)
        masks = Masks.from_counts(self.first_counts(), spec.grid, spec.prefix)
        images = loader(self.learning(), 16)
        plan = train_dps(self.model, images, masks, seed=seed).bind(spec)
        return Planned(plan, macs.cut(spec, plan)), time.perf_counter() - start

    def add(
        self,
        method: str,
        find: Callable[[], tuple[Result | Planned, float]],
        training: Mapping[str, object] = NONE,
        **about: object,
    ) -> Masks | None:
        """Run one experiment unless its row is there; the masks, if it ran.

        Args:
            method: its name in the CSV.
            find: how masks or a plan are found.
            training: settings of `finetune`; none leaves the model as it is.
            about: other columns that tell it from other experiments.
        """
        about = {"method": method, "finetune_epochs": training["epochs"], **about}
        self.rows, self.samples = _read(self.args.output), 0
        if any(_same(row, self.args.model, about) for row in self.rows):
            return None
        result, seconds = find()
        slim = apply_masks(result.model or self.model, result.masks)
        start = time.perf_counter()
        if training["epochs"]:
            train = loader(self.learning(training=True), 32, shuffle_seed=0)
            slim = finetune(slim, self.model, train, **training).model  # type: ignore[arg-type]
        tuned = time.perf_counter() - start
        measured = evaluate(
            self.model, slim.eval(), loader(self.images(self.args.validate), 25), progress=True
        )
        row = {
            "model": self.args.model,
            "score": "eq6",
            "block_epochs": 0,
            "semantics": result.masks.semantics,
            "kept": " ".join(map(str, result.masks.counts)),
            "cut": round(result.cut, 4),
            "images": measured.images,
            "top1": _percent(measured.top1, "top1"),
            "dense_top1": _percent(measured.dense_top1, "dense_top1"),
            "agreement": _percent(measured.agreement, "agreement"),
            "divergence": measured.divergence,
            "search_seconds": round(seconds),
            "finetune_seconds": round(tuned) if training["epochs"] else "",
            "samples": self.samples,
            "slimvit": __version__,
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
        } | about
        # Read again: another process may have added its rows meanwhile.
        self.rows = [*_read(self.args.output), {n: str(row.get(n, "")) for n in COLUMNS}]
        _write(self.args.output, self.rows)
        print({k: row[k] for k in ("method", "cut", "top1", "dense_top1", "agreement")}, flush=True)
        return result.masks

    def all(self) -> None:
        """Every experiment of the tables in the README."""
        if self.args.plans_only:
            self.first()  # it stops here, not after hours, where that is missing
        else:
            self.searches()
        self.plans()

    def plans(self) -> None:
        """Absorb at three cuts, and ablated; DPS with counts that were found, SPViT at that cut."""
        for cut in CUTS:
            self.add(f"absorb {cut}", lambda c=cut: self.planned(Absorb(cut=c)), score="absorb")
            with without_spread():
                plan = f"absorb {cut} without spread"
                self.add(plan, lambda c=cut: self.planned(Absorb(cut=c)), score="absorb")
            self.add(f"absorb {cut} per image", lambda c=cut: self.thresholds(c), score="absorb")
        for seed in range(3):
            self.add(f"dps, seed {seed}", lambda s=seed: self.predicted(s), tolerance=0.02)
        cut = float(self.first()["cut"])
        self.add("spvit", lambda: self.planned(self.selected(cut)), training=SPVIT, score="spvit")

    def selected(self, cut: float) -> SPViT:
        """SPViT whose stages each keep the same share of what they receive."""

        def plan(share: float) -> SPViT:
            return SPViT([share**stage for stage in (1, 2, 3)])

        return plan(share_for_cut(models.spec(self.model), cut, plan))

    def searches(self) -> None:
        """Algorithm 1, its ablations, and fine-tuning."""
        for tolerance in (0.02, 0.01):
            self.add(
                "search",
                lambda t=tolerance: self.search(tolerance=t),
                tolerance=tolerance,
                block_epochs=0,
            )
        self.ablations()
        for tolerance in (0.02, 0.01):
            self.add(
                "search",
                lambda t=tolerance: self.search(tolerance=t, epochs=3),
                tolerance=tolerance,
                block_epochs=3,
            )
        counts = self.first_counts()
        for block_epochs in (0, 3):
            self.add(
                "search + fine-tuning",
                lambda e=block_epochs: self.search(counts=counts, epochs=e),
                training=FINETUNE,
                tolerance=0.02,
                block_epochs=block_epochs,
            )

    def ablations(self) -> None:
        """Other scores and other semantics at the counts of the first experiment."""
        counts = self.first_counts()
        self.add(
            "counts",
            lambda: self.search(counts=counts, score="attention"),
            score="attention",
        )
        for seed in range(3):
            self.add(
                "counts",
                lambda s=seed: self.search(counts=counts, score="random", seed=s),
                score=f"random, seed {seed}",
            )
        for semantics in ("zero", "idle"):
            self.add(
                "counts",
                lambda s=semantics: self.search(counts=counts, semantics=s),
                semantics=semantics,
            )
        cut = float(self.first()["cut"])
        self.add("uniform", lambda: self.search(cut=cut, uniform=True))

    def first(self) -> dict[str, str]:
        """The row of the search at tolerance 0.02."""
        about = {"method": "search", "tolerance": 0.02, "block_epochs": 0}
        for row in self.rows:
            if _same(row, self.args.model, about):
                return row
        raise SystemExit(
            f"{self.args.output} has no search of {self.args.model} at tolerance 0.02, whose "
            "counts other experiments take: run without --plans-only"
        )

    def first_counts(self) -> tuple[int, ...]:
        """Its kept counts."""
        return tuple(map(int, self.first()["kept"].split()))


@contextlib.contextmanager
def without_spread() -> Iterator[None]:
    """Averaged tokens forget how far their members were from them."""

    def mean_alone(alive: Alive, choice: Choice) -> Alive:
        return absorb_tokens(alive, choice)._replace(spread=None)

    with mock.patch.object(dynamic_block, "absorb_tokens", mean_alone):
        yield


def _percent(value: float | None, name: str) -> float:
    if value is None:
        raise SystemExit(f"{name} needs labels: give --class-map, or one folder for each class")
    return round(value, 2)


def _same(row: dict[str, str], model: str, about: dict[str, object]) -> bool:
    defaults = {"score": "eq6", "semantics": "drop", "finetune_epochs": 0, "block_epochs": 0}
    wanted = {"model": model} | defaults | about
    return all(row[name] == str(value) for name, value in wanted.items())


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or COLUMNS) != COLUMNS:
            raise SystemExit(f"{path} has other columns than {', '.join(COLUMNS)}")
        return list(reader)


def _write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue().encode())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--class-map")
    parser.add_argument("--calibrate", default="0:250", help="images of the search (default 0:250)")
    parser.add_argument("--validate", default="250:500", help="held-out images (default 250:500)")
    parser.add_argument("--samples", type=int, default=128, help="images a search looks at")
    parser.add_argument("--plans-only", action="store_true", help="no searches: minutes, not hours")
    here = Path(__file__).parent / "results" / "accuracy.csv"
    parser.add_argument("--output", type=Path, default=here)
    Experiments(parser.parse_args(argv)).all()


if __name__ == "__main__":
    main()
