"""Run `slimvit bench` over models, batches and precisions and add the rows to one CSV file.

    python benchmarks/run.py --threads 2
    python benchmarks/run.py --masks 'masks/{model}.safetensors' --models deit_tiny_patch16_224
    python benchmarks/run.py --plans absorb dps spvit --models deit_tiny_patch16_224

Plans that choose tokens for each image are measured beside static masks of the same counts; their
predictors and selectors are untrained, which speed does not depend on.
What one run in the file holds already, by the same back end and beside the same runtimes, is not
measured again, so that a matrix that was stopped goes on where it was.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is imported

import argparse
import csv
import itertools
from collections import defaultdict
from pathlib import Path

import torch

from slimvit import Absorb, Masks, accelerate, models
from slimvit.bench import (
    RUNTIMES,
    Setting,
    append_csv,
    bench,
    check_csv,
    device_name,
    format_keep,
    parse_keep,
)
from slimvit.cli.bench import describe
from slimvit.dynamic import DPS, Planner, SPViT

MODELS = [f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")]
RESULTS = Path(__file__).parent / "results"
KEY = ("model", "device", "threads", "batch", "precision", "kept")
KEEP = "141,141,131,121,111x7,1"
PLANS = {  # each saves 45 to 46 % of DeiT-Ti's multiply-accumulates
    "absorb": Absorb(cut=0.45),
    "dps": DPS(parse_keep(KEEP)),
    "spvit": SPViT((0.605, 0.366, 0.221)),
}


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    args.output = args.output or RESULTS / ("dynamic.csv" if args.plans else "speed.csv")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    check_csv(args.output)
    device = torch.device(args.device)
    plans = args.plans or ["static"]
    for name, kind, batch, precision in itertools.product(
        args.models, plans, args.batches, args.precisions
    ):
        torch.manual_seed(0)
        checkpoint = args.checkpoint and args.checkpoint.format(model=name)
        model = models.create(name, checkpoint=checkpoint).to(device)
        masks = plan_of(args, model, kind)
        values = (name, device_name(device), args.threads, batch, precision)
        runs = measured(args.output)[key_of(*values, format_keep(masks.counts))]
        setting = Setting(device, batch, precision, args.threads, args.backend)
        wanted = asked(args.against, setting, model, masks) if runs else set()
        if any(wanted <= run for run in runs):
            print(f"{name}, {kind}, batch {batch}, {precision}: already in {args.output}")
            continue
        report = bench(
            model,
            masks,
            batch=batch,
            precision=precision,
            backend=args.backend,
            threads=args.threads,
            rounds=args.rounds,
            seconds=args.seconds,
            against=args.against,
            tell=print,
        )
        append_csv(args.output, report)
        print(f"\n{describe(report)}\n", flush=True)
        torch.compiler.reset()  # it refuses to compile the same code for the ninth model


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--masks", help="masks file; {model} stands for the model's name")
    parser.add_argument("--keep", default=KEEP, help="where no masks are given")
    parser.add_argument("--plans", nargs="+", choices=PLANS, help="instead of masks")
    parser.add_argument("--checkpoint", help="weights; {model} stands for the model's name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--against", nargs="*", help="runtimes; default: all that work here")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument(
        "--output", type=Path, help="default: speed.csv, of plans dynamic.csv, among the results"
    )
    return parser


def plan_of(args: argparse.Namespace, model: torch.nn.Module, kind: str) -> Masks | Planner:
    shape = models.spec(model)
    if kind in PLANS:
        return PLANS[kind].bind(shape)
    if args.masks:
        masks = Masks.load(args.masks.format(model=shape.name))
    else:
        masks = Masks.from_counts(parse_keep(args.keep), shape.grid, shape.prefix)
    models.check_masks(masks, shape)
    return masks


def asked(
    against: list[str] | None, setting: Setting, model: torch.nn.Module, masks: Masks | Planner
) -> set[tuple[str, str]]:
    """Runtime and plan of rows that a run has to have: the slim one of slimvit, dense others."""
    fast = accelerate(model, masks, backend=setting.backend, precision=setting.precision)
    if against is None:
        against = [name for name, other in RUNTIMES.items() if other.why_not(setting) is None]
    slim = (f"slimvit:{fast.backend}", getattr(masks, "kind", "static"))
    return {slim, *((name, "") for name in against)}


def measured(path: Path) -> dict[tuple[str, ...], list[set[tuple[str, str]]]]:
    """The runs that the file holds, by KEY: runtime and plan of each one's rows."""
    runs = defaultdict(lambda: defaultdict(set))
    if path.exists():
        with path.open(newline="") as file:
            for record in csv.DictReader(file):
                run = runs[key_of(*(record[name] for name in KEY))][record["date"]]
                run.add((record["runtime"], record["plan"]))
    return defaultdict(list, {key: list(dates.values()) for key, dates in runs.items()})


def key_of(*values: object) -> tuple[str, ...]:
    return tuple(map(str, values))


if __name__ == "__main__":
    main()
