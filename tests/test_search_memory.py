"""The benchmark of a search's memory."""

import csv
import subprocess
import sys

import pytest
from gpu_bench import BENCHMARKS

PEAKS = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import search_memory
for code in ("", "x = bytearray(200_000_000); x[::4096] = b'1' * len(x[::4096])"):
    print(search_memory.peak_bytes([sys.executable, "-c", code]))
"""


def test_a_peak_is_that_of_the_process():
    """Asked in a small one, below whose own memory no child's peak can be."""
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    less, more = map(int, done.stdout.split())
    assert 1e6 < less < 1e8 < 2e8 < more < 3e8


def test_a_search_that_fails_is_told(bench):
    with pytest.raises(subprocess.CalledProcessError, match="status 3"):
        bench("search_memory").peak_bytes([sys.executable, "-c", "raise SystemExit(3)"])


def test_rows_are_added(bench, tmp_path):
    path = tmp_path / "rows.csv"
    for images in (128, 500):
        bench("search_memory").write(path, {"images": images, "peak_mb": "972"})
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["images"], row["peak_mb"]) for row in rows] == [("128", "972"), ("500", "972")]
    assert all(row["device"] and row["date"] for row in rows)
