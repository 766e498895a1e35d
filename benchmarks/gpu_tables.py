"""Rows of gpu-speed.csv and gpu-kernels.csv, their ratios, and what is printed of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from gpu_clock import CLOCKS, FACTS
from gpu_models import Row, paired
from gpu_plan import Record, Step

from slimvit import Masks
from slimvit.bench import format_keep
from slimvit.errors import UsageError
from slimvit.files import atomic_write
from slimvit.macs import cut
from slimvit.models import Spec

_RUN = ("date", *FACTS, *CLOCKS)
SPEED = _RUN + ("model", "image_size", "batch", "precision", "step", "runtime", "form", "graphs")
SPEED += ("kept", "cut", "median", "min", "max", "latency_ms", "peak_mib", "over_dense")
SPEED += ("over_compile", "of_ideal", "latency_over_dense", "latency_over_torch", "error")
SPEED += ("torch_error", "rounds")
KERNELS = _RUN + ("model", "image_size", "batch", "precision", "form", "kept", "kernel")
KERNELS += ("launches", "microseconds", "floor_microseconds", "of_floor", "bound", "gflop")
KERNELS += ("mbytes", "peak_tflops", "peak_gbytes", "error", "torch_error")

COMPILED = "torch.compile"
LEAST_BATCH = 256
# By the end of a model's name: slim over the best torch.compile dense; slim over own dense, of the
# ideal. And at batch 1 in CUDA graphs: slim latency over dense latency, at most.
TARGETS = {"tiny": (2.2, 0.95), "small": (1.85, 0.95), "base": (1.65, 0.92)}
LATENCY_TARGET = 0.6


def speed_records(
    step: Step, rows: Sequence[Row], shape: Spec, masks: dict[str, Masks], run: Record
) -> list[Record]:
    """A step's rows with their ratios, which are taken within rounds."""
    share = cut(shape, masks["slim"])
    compiled = [row for row in rows if row.runtime.startswith(COMPILED)]
    best = max(compiled, key=lambda row: median(row.rates), default=None)
    torch_row = next((row for row in rows if row.runtime == "torch"), None)
    records = []
    for row in rows:
        own = next(
            (r for r in rows if (r.runtime, r.form) == (row.runtime, "dense") and r is not row),
            None,
        )
        speedup = None if own is None else paired(row.rates, own.rates)
        behind = None if own is None else paired(row.latencies, own.latencies)
        ours = row.runtime.startswith("slimvit:")
        over = paired(row.rates, best.rates) if ours and best else None
        eager = paired(row.latencies, torch_row.latencies) if ours and torch_row else None
        figures = {
            "cut": share if row.form == "slim" else 0.0,
            "over_dense": speedup,
            "over_compile": over,
            "of_ideal": None if speedup is None else speedup * (1 - share),
            "latency_over_dense": behind,
            "latency_over_torch": eager,
        }
        records.append(
            run
            | {name: "" if value is None else f"{value:.4f}" for name, value in figures.items()}
            | _own(step, row, masks)
        )
    return records


def _own(step: Step, row: Row, masks: dict[str, Masks]) -> Record:
    return {
        "model": step.model,
        "image_size": str(step.image_size),
        "batch": str(step.batch),
        "precision": step.precision,
        "step": step.kind,
        "runtime": row.runtime,
        "form": row.form,
        "graphs": str(row.graphs).lower(),
        "kept": format_keep(masks[row.form].counts),
        "median": f"{median(row.rates):.2f}",
        "min": f"{min(row.rates):.2f}",
        "max": f"{max(row.rates):.2f}",
        "latency_ms": f"{1e3 * median(row.latencies):.4f}",
        "peak_mib": "" if row.peak_mib is None else f"{row.peak_mib:.1f}",
        "error": f"{row.error:.1e}",
        "torch_error": f"{row.torch_error:.1e}",
        "rounds": str(len(row.rates)),
    }


def read(path: Path, columns: Sequence[str]) -> list[Record]:
    """The rows of a file, none where it does not exist.

    Raises:
        UsageError: it has other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or columns) != tuple(columns):
            raise UsageError(f"{path} has other columns than this benchmark writes: move it away")
        return list(reader)


def write(path: Path, columns: Sequence[str], records: Iterable[Record]) -> None:
    """All rows, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text.getvalue().encode())


def speed_table(records: Sequence[Record]) -> str:
    """Images a second, ours beside the others, by model, size, batch and precision: Markdown."""
    head = ["model", "px", "batch", "precision", "torch", "compile", "max-autotune", "ours dense"]
    head += ["ours slim", "slim / dense", "slim / compile"]
    lines = _head(head)
    for key in dict.fromkeys(_where(record) for record in records if record["step"] != "graphs"):
        found = [r for r in records if _where(r) == key and r["step"] != "graphs"]
        slim = _ours(found, "slim")
        cells = [_rate(found, "torch"), _rate(found, COMPILED)]
        cells += [_rate(found, f"{COMPILED}:max-autotune")]
        cells += [_figure(_ours(found, "dense"), "median", ",.0f"), _figure(slim, "median", ",.0f")]
        cells += [_figure(slim, "over_dense", ".2f"), _number(_over_compile(found), ".2f")]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    return "\n".join(lines)


def kernel_table(records: Sequence[Record]) -> str:
    """Microseconds of each kernel in all its launches, and its floor's share of them: Markdown."""
    keys = dict.fromkeys((*_where(record), record["form"]) for record in records)
    names = list(dict.fromkeys(record["kernel"] for record in records))
    lines = _head(["model", "px", "batch", "precision", "form", *names])
    for key in keys:
        times = {r["kernel"]: r for r in records if (*_where(r), r["form"]) == key}
        cells = []
        for name in names:
            row = times.get(name)
            share = f" ({100 * float(row['of_floor']):.0f} %)" if row and row["of_floor"] else ""
            cells.append(f"{float(row['microseconds']):.1f}{share}" if row else "")
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    return "\n".join(lines)


def acceptance(records: Sequence[Record]) -> str:
    """The ratios that have to be reached, for each model, precision and large batch: Markdown."""
    lines = _head(["model", "precision", "batch", "ratio", "measured", "wanted", ""])
    for model, pixels, batch, precision in dict.fromkeys(map(_where, records)):
        found = [r for r in records if _where(r) == (model, pixels, batch, precision)]
        wanted = next((t for size, t in TARGETS.items() if size in model), None)
        if wanted is None or pixels != "224":
            continue
        ratios: list[tuple[str, float | None, float, bool]] = []
        plain = [r for r in found if r["step"] != "graphs"]
        slim = _ours(plain, "slim")
        if int(batch) >= LEAST_BATCH:
            modes = {r["runtime"] for r in plain}
            which = "best" if f"{COMPILED}:max-autotune" in modes else "default"
            name = f"slim / {which} torch.compile dense"
            ratios.append((name, _over_compile(plain), wanted[0], True))
            of_ideal = float(slim["of_ideal"]) if slim and slim["of_ideal"] else None
            ratios.append(("slim / own dense, of the ideal", of_ideal, wanted[1], True))
        graphs = _ours([r for r in found if r["step"] == "graphs"], "slim")
        if batch == "1" and graphs:
            for against in ("dense", "torch"):
                value = graphs[f"latency_over_{against}"]
                name = f"latency in graphs, slim / {'own' if against == 'dense' else 'torch'} dense"
                ratios.append((name, float(value) if value else None, LATENCY_TARGET, False))
        for name, value, limit, least in ratios:
            met = value is not None and (value >= limit if least else value <= limit)
            told = "not measured" if value is None else f"{value:.3f}"
            bound = f"{'≥' if least else '≤'} {limit:g}"
            verdict = "" if value is None else "met" if met else "MISSED"
            lines.append(
                f"| {model} | {precision} | {batch} | {name} | {told} | {bound} | {verdict} |"
            )
    return "\n".join(lines)


def _where(record: Record) -> tuple[str, str, str, str]:
    return record["model"], record["image_size"], record["batch"], record["precision"]


def _ours(records: Iterable[Record], form: str) -> Record | None:
    """The row of our kernels, the faster ones; of the step with all runtimes if there is one."""
    kernels = ("slimvit:triton", "slimvit:cuda")
    rows = [r for r in records if r["runtime"] in kernels and r["form"] == form]
    order = {"rows": 1, "graphs": 1}
    return max(rows, key=lambda r: (order.get(r["step"], 0), float(r["median"])), default=None)


def _over_compile(records: Sequence[Record]) -> float | None:
    """Slim over the fastest mode of torch.compile, each measured in its own rounds."""
    ratios = []
    for step in {record["step"] for record in records}:
        slim = _ours([r for r in records if r["step"] == step], "slim")
        if slim and slim["over_compile"]:
            ratios.append(float(slim["over_compile"]))
    return min(ratios, default=None)


def _rate(records: Iterable[Record], runtime: str) -> str:
    return _figure(next((r for r in records if r["runtime"] == runtime), None), "median", ",.0f")


def _figure(record: Record | None, column: str, form: str) -> str:
    return _number(float(record[column]) if record and record[column] else None, form)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _head(cells: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |", "| --- " * len(cells) + "|"]
