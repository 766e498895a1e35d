"""The most memory that a search takes, for several numbers of images, each in its own process.

    python benchmarks/search_memory.py --model deit_tiny_patch16_224 --checkpoint W.safetensors \\
        --data-dir images/

Adds a row for each to results/search_memory.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

OUTPUT = Path(__file__).parent / "results" / "search_memory.csv"
PRUNE = [sys.executable, "-m", "slimvit", "prune", "--epochs", "0", "--restart"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--samples", nargs="+", type=int, default=[128, 500])
    parser.add_argument("--cache-mb", type=int, default=64, help="memory for features, in 10^6 B")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    records = []
    for samples in args.samples:
        records.append(searched(args, samples))
        print(records[-1], flush=True)
    for record in records:  # a child's peak is never below its parent's: now it may load torch
        write(args.output, record)


def searched(args: argparse.Namespace, samples: int) -> dict[str, object]:
    """A search as the command runs it: its peak, its time and what it kept."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [*PRUNE, "--model", args.model, "--checkpoint", str(args.checkpoint)]
        command += ["--data-dir", str(args.data_dir), "--samples", str(samples), "--device", "cpu"]
        command += ["--cache-bytes", str(args.cache_mb * 10**6), "--json", str(report)]
        begin = time.perf_counter()
        peak = peak_bytes([*command, "--output", str(Path(folder) / "masks.safetensors")])
        seconds = time.perf_counter() - begin
        found = json.loads(report.read_text())
    return {
        "model": args.model,
        "images": samples,
        "cache_mb": args.cache_mb,
        "peak_mb": f"{peak / 1e6:.0f}",
        "seconds": f"{seconds:.1f}",
        "kept": " ".join(map(str, found["kept"])),
        "cut": f"{found['cut']:.4f}",
    }


def peak_bytes(command: Sequence[str]) -> int:
    """The largest resident set of a process, in bytes.

    Raises:
        CalledProcessError: it failed.
    """
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return usage.ru_maxrss * 1024  # Linux tells KiB


def write(path: Path, record: dict[str, object]) -> None:
    """Add a row, with versions, commit and date."""
    import torch

    import slimvit
    from slimvit.bench import commit, device_name

    record = record | {
        "device": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "slimvit": slimvit.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, record, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(record)


if __name__ == "__main__":
    main()
