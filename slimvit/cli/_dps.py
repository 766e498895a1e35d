"""`slimvit prune --dynamic`: predictors that choose for each image, with the counts of masks."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimvit.cli import common
from slimvit.cli._found_plan import values_of
from slimvit.cli.common import number, whole_number
from slimvit.errors import UsageError
from slimvit.models import spec
from slimvit.search.predictors import EPOCHS, SPREAD, fit_dps

if TYPE_CHECKING:
    from torch import nn

    from slimvit.data import Batches
    from slimvit.dynamic import DPS
    from slimvit.masks import Masks
    from slimvit.search import PredictorReport


def add_arguments(parser: argparse.ArgumentParser, budget: argparse._ActionsContainer) -> None:
    """Add --dynamic and what belongs to it; --masks to the group of the budgets."""
    group = parser.add_argument_group("dynamic")
    group.add_argument(
        "--dynamic",
        action="store_true",
        help="fit predictors that choose for each image (DPS); OUTPUT is then a plan",
    )
    budget.add_argument(
        "--masks",
        type=Path,
        metavar="FILE",
        help="with --dynamic: take the counts from these masks instead of searching",
    )
    group.add_argument(
        "--predictor-epochs",
        type=whole_number(1),
        metavar="E",
        help=f"over the images, for each predictor (default {EPOCHS})",
    )
    group.add_argument(
        "--spread",
        type=number(least=0),
        metavar="X",
        help="how evenly kept patches spread over the image; 0 takes the best scores alone "
        f"(default {SPREAD:g})",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse flags that have no meaning together.

    Raises:
        UsageError: one needs another, or excludes it.
    """
    if not args.dynamic:
        for flag in ("masks", "predictor_epochs", "spread"):
            if getattr(args, flag) is not None:
                raise UsageError(f"--{flag.replace('_', '-')} needs --dynamic")
        return
    if args.masks is not None and args.granularity is not None:
        raise UsageError("--granularity has no meaning with --masks: nothing is searched")
    if args.epochs > 0:
        raise UsageError("--dynamic needs --epochs 0: it trains predictors, not the model")
    if args.semantics != "drop":
        raise UsageError(f"--dynamic needs --semantics drop, got {args.semantics}")
    if args.score == "random":
        raise UsageError("--dynamic needs a score of the image: --score random has none")


def masks_beside(output: Path) -> Path:
    """Where the masks of a search before --dynamic go."""
    return output.with_name(f"{output.stem}.masks.safetensors")


def run(args: argparse.Namespace, model: nn.Module, images: Batches, masks: Masks) -> None:
    """Fit the predictors, save the plan, print a table, write the JSON."""
    start = time.perf_counter()
    options = {
        "score": args.score,
        "epochs": args.predictor_epochs or EPOCHS,
        "spread": SPREAD if args.spread is None else args.spread,
        "seed": args.seed,
    }
    cache = int(args.cache_gb * 2**30) if args.cache_bytes is None else args.cache_bytes
    used = options | {"score": args.rates, "cache_bytes": cache}
    plan, report = fit_dps(model, images, masks, progress=sys.stderr.isatty(), **used)
    if not common.is_first():
        return
    plan.cpu().save(args.output)
    values = values_of(args, plan, spec(model), images, start) | {
        "masks": str(args.masks or masks_beside(args.output)),
        "blocks": [vars(entry) for entry in report],
        "options": options,
    }
    with common.then_say(f"{describe(args.model, plan, report, values)}\nwrote {args.output}"):
        if args.json is not None:
            common.write_json(args.json, values)


def describe(
    name: str, plan: DPS, report: tuple[PredictorReport, ...], values: dict[str, Any]
) -> str:
    """A table with one row a predictor, and the cut in a line."""
    rows = [
        (f"block {b.layer}", b.alive, b.kept, f"{b.loss:.3f}", f"{b.correlation:.2f}")
        for b in report
    ]
    return "\n".join(
        [
            common.table(rows, (name, "alive", "kept", "loss", "rank correlation")),
            "",
            f"{100 * values['cut']:.1f} % fewer MACs, predictors included: {values['gmacs']:.3f} G "
            f"of {values['dense_gmacs']:.3f} G an image; {values['images']} images, "
            f"{values['seconds']:.0f} s",
        ]
    )
