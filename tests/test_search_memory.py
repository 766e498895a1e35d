"""The benchmark of a search's memory."""

import csv
import subprocess
import sys

import pytest


def test_peak_is_that_of_the_process(bench):
    search_memory = bench("search_memory")
    held = "x = bytearray(300_000_000); x[::4096] = b'1' * len(x[::4096])"
    more = search_memory.peak_bytes([sys.executable, "-c", held])
    # A child's peak is never below what its parent holds when it starts.
    assert more > 3e8
    with pytest.raises(subprocess.CalledProcessError):
        search_memory.peak_bytes([sys.executable, "-c", "raise SystemExit(3)"])


def test_rows_are_added(bench, tmp_path):
    path = tmp_path / "rows.csv"
    for images in (128, 500):
        bench("search_memory").write(path, {"images": images, "peak_mb": "972"})
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["images"], row["peak_mb"]) for row in rows] == [("128", "972"), ("500", "972")]
    assert all(row["device"] and row["date"] for row in rows)
