"""The CSV file that runs are added to."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimvit.errors import UsageError
from slimvit.files import alone_in, atomic_write, is_device

if TYPE_CHECKING:
    from slimvit.bench._report import Report

CSV_COLUMNS = (
    "date",
    "model",
    "device",
    "threads",
    "batch",
    "precision",
    "kept",
    "cut",
    "runtime",
    "row_precision",
    "pruned",
    "median",
    "min",
    "max",
    "speedup",
    "gflops",
    "of_peak",
    "error",
    "rounds",
    "seconds",
    "rejected",
    "slimvit",
    "torch",
    "timm",
    "onnxruntime",
    "openvino",
    "commit",
    "plan",
    "rates",
    "images",
)


def check_csv(path: str | os.PathLike[str]) -> None:
    """Refuse, before anything is measured, a file that records cannot be added to.

    Raises:
        UsageError: its folder is missing, or it is no such CSV file.
    """
    path = Path(path)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder or in none that exists")
    _read(path)


def append_csv(path: str | os.PathLike[str], report: Report) -> None:
    """Add the report's rows to a CSV file, whole or not at all; a new file gets a header."""
    check_csv(path)
    with alone_in(Path(path).absolute().parent):
        old = _read(Path(path))
        if old and not old.endswith("\n"):
            old += "\n"
        atomic_write(path, (old + _text(report.to_csv(), header=not old)).encode())


def _read(path: Path) -> str:
    """What the file holds, with the columns of CSV_COLUMNS; of a device nothing."""
    if is_device(path) or not path.exists():
        return ""
    try:
        text = path.read_text(encoding="utf-8")
        header = tuple(next(csv.reader(io.StringIO(text, newline="")), ()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} must be a CSV file in UTF-8: {error}") from error
    if header and header != CSV_COLUMNS:
        raise UsageError(f"{path} has other columns than `slimvit bench` writes")
    return text


def _text(records: list[dict[str, Any]], header: bool) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
