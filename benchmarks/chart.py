"""Draw the charts of the results.

    python benchmarks/chart.py                      # results/*.csv -> results/*.png
    python benchmarks/chart.py FILE.csv --output DIR

A file with a column `threads` gives images per second, dense -> slim, one picture for each device,
batch and precision, and another of plans that choose tokens for each image; a file with a column
`top1` gives accuracy over the MACs saved.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
DENSE, SLIM, INK = "#b8bfc8", "#1f6feb", "#30363d"
LINES = ["#1f6feb", "#d1570a", "#2a8a4a", "#8250b8", "#b3263e", "#6b7280"]
MARKERS = "os^D"
ORDER = ["torch", "torch.compile", "onnxruntime", "openvino"]

Record = dict[str, str]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--output", type=Path, help="folder; default: beside each file")
    args = parser.parse_args(argv)
    for path in args.files or sorted(RESULTS.glob("*.csv")):
        folder = args.output or path.parent
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in charts(read(path)):
            figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
            plt.close(figure)
            print(folder / f"{name}.png")


def read(path: Path) -> list[Record]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def charts(records: list[Record]) -> Iterable[tuple[str, Figure]]:
    """File names without suffix, and figures."""
    columns = records[0] if records else {}
    if "threads" in columns:  # what run.py wrote; gpu.py writes tables
        runs = grouped(records, "device", "threads", "batch", "precision")
        for (device, threads, batch, precision), rows in runs.items():
            title = (
                f"{device}, {threads} thread{'s' * (threads != '1')}, batch {batch}, {precision}"
            )
            names = f"{device} t{threads} b{batch} {precision}"
            planned = {(row["model"], row["kept"]) for row in rows if chosen(row)}
            for kind, of_plans in (("speed", False), ("plans", True)):
                some = [row for row in rows if ((row["model"], row["kept"]) in planned) == of_plans]
                if some:
                    yield slug(f"{kind} {names}"), speed(some, title)
    elif "top1" in columns:
        yield "accuracy", accuracy(records)


def speed(records: list[Record], title: str) -> Figure:
    """Images per second by runtime, a panel a model or plan: a dense and a slim bar each."""
    plans = {(row["model"], row["kept"]): row["plan"] for row in records if chosen(row)}
    models = grouped(records, "model", *(["kept"] if plans else []))
    figure, panels = plt.subplots(
        1, len(models), figsize=(4.6 * len(models), 3.4), squeeze=False, layout="constrained"
    )
    for axes, (of, rows) in zip(panels[0], models.items()):
        draw_speed(axes, newest(rows))
        saved = 100 * float(next(filter(chosen, rows), rows[-1])["cut"])
        name = ", ".join([of[0], plans[of]] if plans else of)
        axes.set_title(f"{name}, {saved:.0f} % fewer MACs", fontsize=9, color=INK, loc="left")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (DENSE, SLIM)]
    figure.legend(
        handles,
        ["dense", "slim"],
        ncols=2,
        loc="outside lower center",
        frameon=False,
        fontsize=8,
    )
    figure.suptitle(f"Images per second: {title}", fontsize=10, color=INK)
    return figure


def draw_speed(axes: Axes, rows: list[Record]) -> None:
    runtimes = sorted({row["runtime"] for row in rows}, key=rank)
    for place, runtime in enumerate(runtimes):
        for row in (row for row in rows if row["runtime"] == runtime):
            slim = row["pruned"] == "true"
            rate, y = float(row["median"]), place + (0.2 if slim else -0.2)
            spread = [[rate - float(row["min"])], [float(row["max"]) - rate]]
            axes.barh(y, rate, 0.38, color=SLIM if slim else DENSE)
            axes.errorbar(rate, y, xerr=spread, color=INK, linewidth=0.8, capsize=1.5)
            gain = f"  {float(row['speedup']):.2f}×" if row["speedup"] else ""
            other = "" if row["row_precision"] == row["precision"] else f"  {row['row_precision']}"
            axes.annotate(
                f"{rate:.{0 if rate >= 100 else 1}f}{gain}{other}",
                (float(row["max"]), y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=INK,
            )
    axes.set_yticks(range(len(runtimes)), runtimes, fontsize=8, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(float(row["max"]) for row in rows))
    plain(axes)


def accuracy(records: list[Record]) -> Figure:
    """Top-1 over the MACs saved, a panel a model, a line a method; dashes at the dense model.

    Seeds and cuts of a method are points of its line. Left out are rows whose pruned tokens stay as
    zero or idle ones, which answer next to nothing, and absorb without spread.
    """
    records = [row for row in records if row["semantics"] == "drop"]
    records = [row for row in records if not row["method"].endswith("without spread")]
    models, names = grouped(records, "model"), list(dict.fromkeys(map(method, records)))
    figure, panels = plt.subplots(
        *(1, len(models)),
        figsize=(3.4 * len(models) + 2.2, 3.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, ((model,), rows) in zip(panels[0], models.items()):
        for number, name in enumerate(names):
            points = [row for row in rows if method(row) == name]
            points.sort(key=lambda row: float(row["cut"]))
            x = [100 * float(row["cut"]) for row in points]
            y = [float(row["top1"]) for row in points]
            line = {"color": LINES[number % len(LINES)], "marker": MARKERS[number // len(LINES)]}
            style = "-" if x and x[-1] - x[0] > 2 else ""
            axes.plot(x, y, markersize=5, linewidth=1.5, linestyle=style, label=name, **line)
        axes.axhline(
            float(rows[0]["dense_top1"]), color=INK, linewidth=0.8, linestyle="--", label="dense"
        )
        axes.set_title(model, fontsize=9, color=INK, loc="left")
        axes.set_xlabel("MACs saved, %", fontsize=8)
        plain(axes)
    panels[0][0].set_ylabel("top-1, %", fontsize=8)
    figure.legend(
        *panels[0][0].get_legend_handles_labels(),
        loc="outside right center",
        fontsize=7,
        frameon=False,
    )
    return figure


def method(row: Record) -> str:
    """What a row is a point of, whatever its seed and its cut."""
    name = re.sub(r"(, seed \d+| [\d.]+)(?= per image|$)", "", row["method"])
    if int(row["block_epochs"] or 0):
        name = name.replace("search", "search with block fine-tuning")
    score = re.sub(r", seed \d+$", "", row["score"])
    return f"{name}, {score}" if name == "counts" else name


def chosen(row: Record) -> bool:
    """Whether its tokens were chosen for each image."""
    return row.get("plan", "") not in ("", "static")


def newest(rows: list[Record]) -> list[Record]:
    """The last record of each runtime, dense and slim: later runs stand further down."""
    return list({(row["runtime"], row["pruned"]): row for row in rows}.values())


def grouped(records: list[Record], *names: str) -> dict[tuple[str, ...], list[Record]]:
    groups = defaultdict(list)
    for record in records:
        groups[tuple(record[name] for name in names)].append(record)
    return dict(groups)


def rank(runtime: str) -> tuple[int, str]:
    return (ORDER.index(runtime) if runtime in ORDER else len(ORDER), runtime)


def plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


if __name__ == "__main__":
    main()
