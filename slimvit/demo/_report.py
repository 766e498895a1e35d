"""What the demo found as one table, as JSON, and as a short report in Markdown."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from slimvit.bench import Report, format_keep
from slimvit.demo import _dynamic
from slimvit.demo._pipeline import Outcome
from slimvit.macs import gmacs

HEADER = ("", "digits dense", "slim", "slim/dense", "DeiT dense", "slim", "slim/dense")
WAYS_HEADER = _dynamic.HEADER


def rows(outcome: Outcome) -> list[list[str]]:
    """The table under HEADER: accuracy, cost, and images per second of every runtime."""
    final = outcome.final
    table = [
        ["held-out top-1, %", f"{final.dense_top1:.1f}", f"{final.top1:.1f}", "", "random", "", ""],
        ["GMACs an image"],
    ]
    masks = (outcome.masks, outcome.compare_masks)
    for shape, kept in zip(outcome.shapes, masks, strict=True):
        dense, slim = gmacs(shape), gmacs(shape, kept)
        table[-1] += [f"{dense:.3f}", f"{slim:.3f}", f"{slim / dense:.2f}"]
    reports = (outcome.digits, outcome.compare)
    names = dict.fromkeys(row.runtime for report in reports for row in report.rows)
    for name in names:
        precisions = {row.precision for r in reports for row in r.rows if row.runtime == name}
        table.append([f"images/s, {name} {'/'.join(sorted(precisions))}"])
        for report in reports:
            table[-1] += _speeds(report, name)
    return table


def ways(outcome: Outcome) -> list[list[str]]:
    """The table under WAYS_HEADER: the ways of choosing patches, at the same share of MACs."""
    return _dynamic.rows(outcome.ways, outcome.final.dense_top1 or 0.0)


def caption(outcome: Outcome) -> str:
    """What the table was measured on."""
    report = outcome.digits
    threads = f"{report.threads} thread{'s' * (report.threads > 1)}"
    return (
        f"{report.device_name}, {threads}, batch {report.batch}; {100 * report.cut:.1f} % and "
        f"{100 * outcome.compare.cut:.1f} % fewer MACs promise x {report.ideal:.2f} and "
        f"x {outcome.compare.ideal:.2f}"
    )


def left_out(outcome: Outcome) -> list[str]:
    """Runtimes without a row, and why."""
    reasons = outcome.digits.left_out | outcome.compare.left_out
    return [f"without {name}: {reason}" for name, reason in reasons.items()]


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Everything as plain values."""
    settings = asdict(outcome.settings) | {"device": str(outcome.settings.device)}
    return {
        "settings": settings,
        "kept": list(outcome.masks.counts),
        "cut": outcome.digits.cut,
        "gmacs": gmacs(outcome.shapes[0], outcome.masks),
        "dense_gmacs": gmacs(outcome.shapes[0]),
        "layers": [asdict(layer) for layer in outcome.search.report],
        "pruned": asdict(outcome.pruned),
        "final": asdict(outcome.final),
        "ways": [asdict(way) for way in outcome.ways],
        "bench": {
            report.model: report.to_json()
            | {"kept": list(report.kept), "left_out": report.left_out}
            for report in (outcome.digits, outcome.compare)
        },
        "versions": outcome.digits.versions,
        "seconds": outcome.seconds,
    }


def to_markdown(outcome: Outcome) -> str:
    """The report: the table, how it came about, and the pictures beside it."""
    s, final = outcome.settings, outcome.final
    tuned = f"{s.block_epochs} epoch{'s' * (s.block_epochs != 1)} of block fine-tuning a step"
    layers = [
        [str(layer.layer), str(layer.kept), f"{layer.error:.4f}", f"{layer.seconds:.1f}"]
        for layer in outcome.search.report
    ]
    versions = ", ".join(f"{name} {v}" for name, v in outcome.digits.versions.items() if v)
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in outcome.seconds.items())
    parts = [
        "# slimvit demo",
        f"A small ViT for handwritten digits ({outcome.shapes[0].depth} blocks, "
        f"{outcome.shapes[0].tokens} tokens), slimmed on this machine, and {outcome.compare.model} "
        "with random weights, slimmed by the same share.",
        _markdown([HEADER, *rows(outcome)]),
        caption(outcome) + ".",
        *left_out(outcome),
        *_ways_section(outcome),
        "## How",
        f"Algorithm 1 on {s.calibration} training digits, tolerance {s.tolerance}, granularity "
        f"{s.granularity}, {tuned}; then {s.epochs} epochs of fine-tuning of the whole by "
        f"distillation. On {final.images} digits that were in none of it: dense "
        f"{final.dense_top1:.1f} %, pruned {outcome.pruned.top1:.1f} %, fine-tuned and accelerated "
        f"in {s.precision} {final.top1:.1f} %, the same answer as the dense model on "
        f"{final.agreement:.1f} %.",
        _markdown([("block", "kept", "error", "seconds"), *layers]),
        "![kept patches block by block](kept.png)",
        "![kept counts and how deep each patch lives](pyramid.png)",
        f"{outcome.compare.model} keeps {format_keep(outcome.compare_masks.counts)} tokens.",
        f"{versions}. {stages}.",
    ]
    return "\n\n".join(parts) + "\n"


def _ways_section(outcome: Outcome) -> list[str]:
    if not outcome.ways:
        return []
    epochs = outcome.settings.dynamic_epochs
    return [
        "## Who chooses the patches",
        _markdown([WAYS_HEADER, *ways(outcome)]),
        f"SPViT's selectors were trained for {epochs} epoch{'s' * (epochs > 1)} (in the first "
        "alone, then with the model); DPS' predictors were fitted to the search's score of each "
        "image and the model fine-tuned to them for as many. Package tokens count as patches. "
        "These are timed beside each other, apart from the runtimes above.",
    ]


def _speeds(report: Report, name: str) -> list[str]:
    dense, slim = report.find(name, pruned=False), report.find(name, pruned=True)
    cells = [f"{row.images_per_second()['median']:.0f}" if row else "" for row in (dense, slim)]
    ratio = report.speedup(slim) if slim else None
    return [*cells, f"{ratio:.2f}" if ratio else ""]


def _markdown(table: list[Any]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    rule = "| --- |" + " ---: |" * (len(table[0]) - 1)
    return "\n".join([lines[0], rule, *lines[1:]])
