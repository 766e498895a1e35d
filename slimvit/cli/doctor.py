"""slimvit doctor: what works on this machine, and why the rest does not."""

from __future__ import annotations

import argparse

from slimvit import doctor
from slimvit.cli.common import write_json

HELP = "tell what works on this machine and why the rest does not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `slimvit doctor`."""
    parser.add_argument("--json", metavar="FILE", help="write the report there as JSON, too")


def run(args: argparse.Namespace) -> int:
    """Print the table; status 1 where no back end works."""
    report = doctor.examine()
    if args.json:
        write_json(args.json, report)
    print(doctor.describe(report))
    return 0 if any(report["auto"].values()) else 1
