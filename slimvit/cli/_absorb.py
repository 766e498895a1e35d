"""`slimvit prune --absorb`: counts for Absorb, and thresholds by which images differ in them."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from slimvit.cli import common
from slimvit.cli._found_plan import values_of
from slimvit.dynamic import Absorb
from slimvit.errors import UsageError
from slimvit.models import spec
from slimvit.search import Trial, fit_absorb, fit_thresholds

if TYPE_CHECKING:
    from torch import nn

    from slimvit.data import Batches

# Flags of the search and of DPS, with the values that stand for "not given".
_OTHERS = {
    "masks": None,
    "dynamic": False,
    "uniform": False,
    "epochs": 0,
    "granularity": None,
    "score": "eq6",
    "semantics": "drop",
    "weights_output": None,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --absorb and --per-image."""
    group = parser.add_argument_group("absorb")
    group.add_argument(
        "--absorb",
        action="store_true",
        help="with --cut or --speedup: find how many tokens each block should keep where the "
        "others are absorbed; OUTPUT is then a plan",
    )
    group.add_argument(
        "--per-image",
        action="store_true",
        help="with --absorb: each image keeps as many patches as it takes, those counts on average",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse flags that have no meaning together.

    Raises:
        UsageError: --absorb without a budget of its own, or with a flag of another search;
            --per-image without --absorb.
    """
    if not args.absorb:
        if args.per_image:
            raise UsageError("--per-image has no meaning without --absorb")
        return
    for flag, absent in _OTHERS.items():
        if getattr(args, flag) != absent:
            raise UsageError(f"--{flag.replace('_', '-')} has no meaning with --absorb")
    if args.cut is None and args.speedup is None:
        raise UsageError("--absorb needs --cut or --speedup")


def run(args: argparse.Namespace, model: nn.Module, images: Batches) -> None:
    """Find the counts, and thresholds, save the plan, print a table, write the JSON."""
    start, progress = time.perf_counter(), sys.stderr.isatty()
    plan, trials = fit_absorb(model, images, cut=args.cut, speedup=args.speedup, progress=progress)
    if args.per_image:
        plan = fit_thresholds(model, plan, images, progress=progress)
    if not common.is_first():
        return
    plan.save(args.output)
    values = values_of(args, plan, spec(model), images, start) | {
        "thresholds": list(plan.thresholds) if plan.ragged else None,
        "trials": [trial._asdict() for trial in trials],
    }
    with common.then_say(f"{describe(plan, trials, values)}\nwrote {args.output}"):
        if args.json is not None:
            common.write_json(args.json, values)


def describe(plan: Absorb, trials: tuple[Trial, ...], values: dict[str, Any]) -> str:
    """A table with one row for each schedule tried, the best first, and the cut in a line.

    The last column tells which was taken, and the standard errors of the others beside Absorb's.
    """
    rows = [
        (
            ",".join(map(str, trial.counts)),
            f"{trial.divergence:.4f}",
            _mark(trial, plan),
        )
        for trial in sorted(trials, key=lambda trial: trial.divergence)
    ]
    return "\n".join(
        [
            common.table(rows, ("kept", "KL(dense, slim)", "")),
            "",
            f"{100 * values['cut']:.1f} % fewer MACs, choosing included: {values['gmacs']:.3f} G "
            f"of {values['dense_gmacs']:.3f} G an image{', on average' * plan.ragged}; "
            f"{values['images']} images, {values['seconds']:.0f} s",
        ]
    )


def _mark(trial: Trial, plan: Absorb) -> str:
    if trial.counts == plan.counts:
        return "taken"
    return f"± {trial.error:.4f}" if trial.error else ""
