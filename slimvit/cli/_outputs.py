"""What the commands write: checked before the work, and on disk before anything is printed."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slimvit.errors import UsageError
from slimvit.files import atomic_write, descriptor, is_device, is_writable, refuse_unwritable

_READ = ("checkpoint", "slim_checkpoint", "masks", "image", "class_map", "latency_table")
_TEXT = ("--json", "--csv")
_PRINTED_TO = (1, 2)


def check_outputs(args: argparse.Namespace, outputs: Mapping[str, Path | None]) -> None:
    """Refuse files that could not be written, or of which one would destroy another.

    Args:
        args: of the command; what its flags name is read.
        outputs: what the command writes, by the flag or the words that name it; None for nothing.

    Raises:
        UsageError: `check_output` refuses one, two are the same file, one is read, too, or what is
            printed would spoil or lose it.
    """
    taken = {}
    for name in _READ:
        if (path := getattr(args, name, None)) is not None:
            taken[os.path.realpath(path)] = f"--{name.replace('_', '-')}"
    taken |= {os.path.realpath(path): "--import" for path in getattr(args, "imports", ())}
    if (score := getattr(args, "score", None)) is not None:
        taken[os.path.realpath(score.rpartition(":")[0])] = "--score"
    for name, path in outputs.items():
        check_output(name, path)
        if path is None:
            continue
        if _is_printed_to(path) and not (is_device(path) and name in _TEXT):
            raise UsageError(
                f"{name} must be another file than where results are printed, got {path}"
            )
        if is_device(path):
            continue
        other = taken.setdefault(os.path.realpath(path), name)
        if other != name:
            raise UsageError(f"{name} must be another file than {other}, both are {path}")


def check_output(flag: str, path: Path | None) -> None:
    """Refuse a file that could not be written, before minutes are spent on what goes into it.

    Raises:
        UsageError: its folder is missing or not writable, or it is a folder itself.
    """
    if path is None:
        return
    if not is_device(path):
        refuse_unwritable(flag, path)
    elif not is_writable(path):
        raise UsageError(f"{flag} {path} is not writable")


def _is_printed_to(path: Path) -> bool:
    """Whether it is stdout's or stderr's descriptor, or the file that one of them goes to."""
    if is_device(path):
        return descriptor(path) in _PRINTED_TO
    for number in _PRINTED_TO:
        with contextlib.suppress(OSError):  # it is not there, or the descriptor is closed
            if os.path.samestat(os.stat(path), os.fstat(number)):
                return True
    return False


def write_json(path: str | os.PathLike[str], values: dict[str, Any]) -> None:
    """Write `values` as JSON, whole or not at all; NaN and infinity become null."""
    text = json.dumps(_finite(values), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    # A file name of other bytes than UTF-8 is a string with surrogates; JSON escapes them alike.
    atomic_write(path, text.encode(errors="backslashreplace"))


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Print a result; under torchrun the first process only."""
    if is_first():
        print(message, flush=True)


@contextlib.contextmanager
def then_say(message: str) -> Iterator[None]:
    """Print a result once the files of the block are written, or could not be.

    So neither a stdout that is closed costs a file, nor a full disk what is printed.
    """
    try:
        yield
    finally:
        say(message)


def warn(message: str) -> None:
    """One line on stderr; under torchrun from the first process only."""
    if is_first():
        print(f"warning: {message}", file=sys.stderr, flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
