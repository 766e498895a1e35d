"""Print the ratios of every run in CSV files of speed, as a Markdown table.

    python benchmarks/ratios.py                  # results/speed.csv and results/dynamic.csv
    python benchmarks/ratios.py FILE.csv …

They are medians over the rounds of ratios within a round. Runs from before rounds were written down
have quotients of medians instead, marked "≈".
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path

from slimvit.bench import Row, check_csv, ratios_of
from slimvit.errors import UsageError

RESULTS = Path(__file__).parent / "results"
RUN = ("date", "model", "device", "threads", "batch", "precision", "kept")
TOLD = {
    "slim_over_own_dense": "slim / own dense",
    "slim_over_own_dense_over_ideal": "of ideal",
    "slim_over_strongest_dense": "slim / strongest dense",
    "slim_over_strongest_slim": "slim / strongest slim",
    "dense_over_strongest_dense": "dense / strongest dense",
    "plan_over_static": "plan / static",
}

Record = dict[str, str]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path)
    args = parser.parse_args(argv)
    for path in args.files or [RESULTS / "speed.csv", RESULTS / "dynamic.csv"]:
        try:
            check_csv(path)
            with path.open(newline="") as file:
                print(f"\n{path}\n\n{table(csv.DictReader(file))}")
        except (OSError, UsageError) as error:
            parser.error(str(error))


def table(records: Iterable[Record]) -> str:
    """A line for each run."""
    runs: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        runs.setdefault(tuple(record[name] for name in RUN), []).append(record)
    lines = [["model", "device", "batch", "precision", "plan", "fewer MACs", *TOLD.values()]]
    lines.append(["---"] * len(lines[0]))
    lines += [line(run) for run in runs.values()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def line(run: list[Record]) -> list[str]:
    rows = [row_of(record) for record in run]
    first = next((row for row in zip(rows, run) if row[0].ours and row[0].pruned), None)
    if first is None:
        raise UsageError(f"the run of {run[0]['date']} has no slim row of slimvit")
    slim, record = first
    cut = float(record["cut"])
    found = ratios_of(rows, cut)
    sign = "" if record["rates"] else "≈ "
    ratios = [f"{sign}{found[name]:.2f}" if name in found else "" for name in TOLD]
    shared = [record[name] for name in ("model", "device", "batch", "precision")]
    return [*shared, slim.plan, f"{100 * cut:.1f} %", *ratios]


def row_of(record: Record) -> Row:
    rates = [float(rate) for rate in record["rates"].split()] or [float(record["median"])]
    return Row(
        runtime=record["runtime"],
        pruned=record["pruned"] == "true",
        precision=record["row_precision"],
        error=float(record["error"]),
        rates=rates,
        plan=record["plan"],
    )


if __name__ == "__main__":
    main()
