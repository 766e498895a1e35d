"""slimvit demo: from trained weights to images per second on this machine, in a few minutes."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from slimvit.cli import common
from slimvit.cli.show import render
from slimvit.errors import UsageError
from slimvit.files import atomic_write

if TYPE_CHECKING:
    from slimvit.demo import Outcome

HELP = "prune, fine-tune, validate and time a small model in a few minutes"


_JSON = "demo.json"  # what --json has, too
_FILES = ("masks.safetensors", "kept.png", "pyramid.png", "report.md", _JSON)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `slimvit demo`."""
    parser.add_argument(
        "--output-dir", type=Path, default=Path("demo-out"), metavar="DIR",
        help="folder for masks, pictures and report (default demo-out)",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=common.number(above=0), default=0.0015, metavar="T",
        help="largest relative error of a block (default 0.0015)",
    )  # fmt: skip
    parser.add_argument(
        "--epochs", type=common.whole_number(0), default=3, metavar="E",
        help="epochs of fine-tuning of the whole model (default 3)",
    )  # fmt: skip
    parser.add_argument(
        "--dynamic-epochs", type=common.whole_number(0), default=1, metavar="E",
        help="epochs of training SPViT, and of fine-tuning to DPS; 0 for neither (default 1)",
    )  # fmt: skip
    parser.add_argument(
        "--backend", default="auto", choices=("auto", *common.backends()),
        help="slimvit's back end (default auto)",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=common.whole_number(1), default=3, metavar="R",
        help="rounds of timing, of which the median is told (default 3)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=common.number(above=0), default=0.5, metavar="S",
        help="length of one row's turn in a round (default 0.5)",
    )  # fmt: skip
    precision = "of the slim model (default bfloat16 where the machine has it, else float32)"
    common.add_run_arguments(parser, batch_size=8, precision=precision)


def run(args: argparse.Namespace) -> int:
    """Run the demo, print one table, write the folder."""
    from slimvit import demo

    common.check_output("--json", args.json)
    folder = _make(args.output_dir)
    outputs = {name: folder / name for name in _FILES}
    if args.json is not None and os.path.realpath(args.json) == os.path.realpath(folder / _JSON):
        del outputs[_JSON]  # the same content
    common.check_outputs(args, outputs | {"--json": args.json})
    start = time.perf_counter()
    settings = demo.Settings(
        tolerance=args.tolerance,
        epochs=args.epochs,
        dynamic_epochs=args.dynamic_epochs,
        batch=args.batch_size,
        precision=args.precision,
        backend=args.backend,
        rounds=args.rounds,
        seconds=args.seconds,
        device=common.device(args),
    )
    outcome = demo.run(settings, say=common.say, progress=sys.stderr.isatty())
    written = _write(folder, outcome)
    if args.json is not None:
        common.write_json(args.json, demo.to_json(outcome))
    common.say(f"\n{common.table(demo.rows(outcome), demo.HEADER)}\n\n{demo.caption(outcome)}")
    if outcome.ways:
        common.say(f"\n{common.table(demo.ways(outcome), demo.WAYS_HEADER)}\n")
    for line in demo.left_out(outcome):
        common.say(line)
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    common.say(f"{', '.join(written)} in {folder}/ after {minutes} min {seconds} s")
    return 0


def _make(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output-dir {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"--output-dir {folder} is not writable")
    return folder


def _write(folder: Path, outcome: Outcome) -> list[str]:
    from slimvit import demo

    outcome.masks.save(folder / "masks.safetensors")
    common.write_json(folder / _JSON, demo.to_json(outcome))
    files = {
        "kept.png": render(outcome.masks.plot(outcome.picture), ".png"),
        "pyramid.png": render(outcome.masks.plot_pyramid(), ".png"),
        "report.md": demo.to_markdown(outcome).encode(),
    }
    for name, content in files.items():
        atomic_write(folder / name, content)
    return ["masks.safetensors", _JSON, *files]
