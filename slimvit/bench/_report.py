"""Results of a run: figures, ratios, JSON and CSV records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from slimvit.bench._keep import format_keep

STATIC = " static"  # at the end of the runtime of a plan's static twin


@dataclass
class Row:
    """One runtime with one model: images per second, one figure a round.

    Attributes:
        runtime: `slimvit:<back end>`, torch, torch.compile, onnxruntime or openvino; with
            ` static` at the end for static masks of the same counts as a plan's.
        pruned: whether it ran the slimmed model.
        precision: what it computed in.
        error: relative error of its logits to the float32 reference.
        rates: images per second of each round.
        plan: how it chose tokens: "static", "absorb", …; "" for a dense model.
        cut: fraction of the MACs that it saved; None for the report's.
        agreement: share of kept places in which it agrees with the float32 reference; None for
            what tells no places.
    """

    runtime: str
    pruned: bool
    precision: str
    error: float
    rates: list[float] = field(default_factory=list)
    plan: str = ""
    cut: float | None = None
    agreement: float | None = None

    @property
    def dynamic(self) -> bool:
        """Whether each image had tokens of its own."""
        return self.plan not in ("", "static")

    @property
    def ours(self) -> bool:
        """Whether it is one of slimvit's back ends."""
        return self.runtime.startswith("slimvit:")

    def images_per_second(self) -> dict[str, float]:
        """Median, min and max over the rounds."""
        return {"median": median(self.rates), "min": min(self.rates), "max": max(self.rates)}


@dataclass
class Report:
    """A run: all its rows, and what they were measured on.

    Attributes:
        model: timm's name.
        device: "cpu" or the CUDA device, as torch names it.
        device_name: the hardware's name.
        threads: CPU threads of every runtime.
        batch: images a call.
        precision: the precision asked for; a row has its own.
        kept: n_1 … n_L.
        cut: fraction of the MACs saved.
        rows: dense ahead of slim, slimvit's first.
        left_out: runtimes without a row, or "<runtime> slim" without that one, and why.
        rounds: figures behind each median.
        seconds: length of each round.
        rejected: rounds thrown away because the machine was busy elsewhere.
        disturbed: rounds that count although it was.
        best_share: the largest share of the threads' CPU time that any row got.
        versions: of slimvit, torch, timm, onnxruntime, openvino.
        commit: of slimvit's checkout, or "".
        date: UTC, ISO 8601, to the second.
        dense_gmacs: executed giga-MACs of the dense model for one image.
        peaks: by precision, the measured GFLOP/s of all threads at nothing but products; empty
            where they are not known.
        images: how many images were timed, a batch a round; 0 for one batch of random ones.
    """

    model: str
    device: str
    device_name: str
    threads: int
    batch: int
    precision: str
    kept: tuple[int, ...]
    cut: float
    rows: list[Row]
    left_out: dict[str, str]
    rounds: int
    seconds: float
    rejected: int
    disturbed: int
    best_share: float
    versions: dict[str, str]
    commit: str
    date: str
    dense_gmacs: float = 0.0
    peaks: dict[str, float] = field(default_factory=dict)
    images: int = 0

    @property
    def ideal(self) -> float:
        """1 / (1 − cut): the speed-up that the arithmetic promises."""
        return 1 / (1 - self.cut)

    def find(self, runtime: str, pruned: bool) -> Row | None:
        """The row of a runtime; "slimvit" finds slimvit's, whatever its back end."""
        return _find(self.rows, runtime, pruned)

    def strongest(self, pruned: bool) -> Row | None:
        """The fastest row of the other runtimes; None where there is none."""
        return _strongest(self.rows, pruned)

    def speedup(self, row: Row) -> float | None:
        """A pruned row over the same runtime's dense row: the median of the rounds' ratios."""
        dense = self.find(row.runtime.removesuffix(STATIC), pruned=False)
        return paired_ratio(row.rates, dense.rates) if row.pruned and dense else None

    def gflops(self, row: Row) -> float:
        """Floating-point operations of the products that a row executes, in 10⁹ a second."""
        return 2 * self.dense_gmacs * (1 - self.cut_of(row)) * median(row.rates)

    def cut_of(self, row: Row) -> float:
        """Fraction of the MACs that a row saves."""
        if not row.pruned:
            return 0.0
        return self.cut if row.cut is None else row.cut

    def share_of_peak(self, row: Row) -> float | None:
        """How much of the processor's measured peak that is; None where the peak is not known."""
        peak = self.peaks.get(row.precision)
        return self.gflops(row) / peak if peak else None

    @property
    def ratios(self) -> dict[str, float]:
        """See `ratios_of`."""
        return ratios_of(self.rows, self.cut)

    @property
    def plan(self) -> str:
        """How the slim model chooses tokens: "static", "absorb", …"""
        slim = self.find("slimvit", pruned=True)
        return slim.plan if slim is not None and slim.plan else "static"

    def to_json(self) -> dict[str, Any]:
        """What `--json` writes."""
        rows: list[dict[str, Any]] = []
        for row in self.rows:
            entry = {
                "runtime": row.runtime,
                "pruned": row.pruned,
                "precision": row.precision,
                "images_per_second": row.images_per_second(),
            }
            share = self.share_of_peak(row)
            if share is not None:
                entry["share_of_peak"] = share
            if row.plan:
                entry["plan"] = row.plan
            if row.agreement is not None:
                entry["kept_agreement"] = row.agreement
            if self.batch == 1:
                entry["latency_ms"] = 1000 / median(row.rates)
            rows.append(entry)
        return {
            "device": self.device,
            "batch": self.batch,
            "precision": self.precision,
            "cut": self.cut,
            "rows": rows,
            "ratios": self.ratios,
        }

    def to_csv(self) -> list[dict[str, Any]]:
        """One record a row, with the columns of CSV_COLUMNS."""
        shared = {
            "date": self.date,
            "model": self.model,
            "device": self.device_name,
            "threads": self.threads,
            "batch": self.batch,
            "precision": self.precision,
            "kept": format_keep(self.kept),
            "rounds": self.rounds,
            "seconds": self.seconds,
            "rejected": self.rejected,
            **self.versions,
            "commit": self.commit,
            "images": self.images,
        }
        records = []
        for row in self.rows:
            speedup, share = self.speedup(row), self.share_of_peak(row)
            own = {
                "runtime": row.runtime,
                "row_precision": row.precision,
                "pruned": str(row.pruned).lower(),
                "plan": row.plan,
                "cut": f"{self.cut if row.cut is None else row.cut:.4f}",
                "speedup": "" if speedup is None else f"{speedup:.4f}",
                "gflops": f"{self.gflops(row):.1f}",
                "of_peak": "" if share is None else f"{share:.4f}",
                "error": f"{row.error:.1e}",
            }
            speeds = {name: f"{rate:.2f}" for name, rate in row.images_per_second().items()}
            speeds["rates"] = " ".join(f"{rate:.2f}" for rate in row.rates)
            records.append({**shared, **own, **speeds})
        return records


def ratios_of(rows: Sequence[Row], cut: float) -> dict[str, float]:
    """Slim over dense by rounds, and how much of the ideal 1 / (1 − cut) that is.

    `slim_over_strongest_dense` and `slim_over_strongest_slim` compare with the other runtimes,
    `slim_over_own_dense` with the same back end; `…_over_ideal` divides by `ideal`;
    `dense_over_strongest_dense` compares without any pruning; `plan_over_static` compares a
    dynamic plan with static masks of the same counts: what choosing costs.

    Args:
        rows: of one run.
        cut: fraction of the MACs that the slim model saves.

    Returns:
        Those whose rows are there.
    """
    slim = _find(rows, "slimvit", pruned=True)
    against = {
        "slim_over_strongest_dense": _strongest(rows, pruned=False),
        "slim_over_own_dense": _find(rows, "slimvit", pruned=False),
        "slim_over_strongest_slim": _strongest(rows, pruned=True),
    }
    found = {"ideal": 1 / (1 - cut)}
    for name, row in against.items():
        if slim is None or row is None:
            continue
        found[name] = paired_ratio(slim.rates, row.rates)
        if not row.pruned:
            found[f"{name}_over_ideal"] = found[name] / found["ideal"]
    dense, strongest = against["slim_over_own_dense"], against["slim_over_strongest_dense"]
    if dense is not None and strongest is not None:
        found["dense_over_strongest_dense"] = paired_ratio(dense.rates, strongest.rates)
    twin = next((row for row in rows if row.runtime.endswith(STATIC)), None)
    if slim is not None and slim.dynamic and twin is not None:
        found["plan_over_static"] = paired_ratio(slim.rates, twin.rates)
    return found


def _find(rows: Sequence[Row], runtime: str, pruned: bool) -> Row | None:
    for row in rows:
        if row.pruned == pruned and runtime in (row.runtime, row.runtime.split(":")[0]):
            return row
    return None


def _strongest(rows: Sequence[Row], pruned: bool) -> Row | None:
    others = [row for row in rows if not row.ours and row.pruned == pruned]
    return max(others, key=lambda row: median(row.rates), default=None)


def paired_ratio(fast: Sequence[float], slow: Sequence[float]) -> float:
    """Median over rounds r of fast[r] / slow[r]: drift from round to round cancels out."""
    return median(f / s for f, s in zip(fast, slow, strict=True))
