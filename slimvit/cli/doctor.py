"""slimvit doctor: what works on this machine, and why the rest does not."""

from __future__ import annotations

import argparse

from slimvit import doctor
from slimvit.cli._types import json_file
from slimvit.cli.common import check_outputs, then_say, write_json

HELP = "tell what works on this machine and why the rest does not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `slimvit doctor`."""
    parser.add_argument(
        "--json",
        type=json_file,
        metavar="FILE",
        help="write the report there as JSON, too; - is stdout, and the table goes to stderr",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; status 1 where no back end works."""
    check_outputs(args, {"--json": args.json})
    report = doctor.examine()
    with then_say(doctor.describe(report)):
        if args.json:
            write_json(args.json, report)
    return 0 if any(report["auto"].values()) else 1
