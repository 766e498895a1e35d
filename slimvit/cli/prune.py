"""slimvit prune: from a model and a few hundred images to a masks file, or to a plan's."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimvit.cli import _absorb, _dps, _own_code, common
from slimvit.cli.common import kept_counts, number, whole_number
from slimvit.errors import UsageError
from slimvit.files import refuse_device
from slimvit.finetune import save_weights
from slimvit.macs import gmacs
from slimvit.masks import SEMANTICS, Masks
from slimvit.models import spec
from slimvit.search import SCORES, search

if TYPE_CHECKING:
    from torch import nn

    from slimvit.data import Batches
    from slimvit.search import Result

HELP = "search which patches each block needs and save the masks or the plan"
SAMPLES = 512
TOLERANCE = 0.02
GRANULARITY = 10
LR = 1e-4
_OUTPUTS = ("--output", "--weights-output", "--json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `slimvit prune`."""
    common.add_model_arguments(parser)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.safetensors",
        help="masks to write; with --dynamic or --absorb the plan",
    )
    parser.add_argument(
        "--weights-output",
        type=Path,
        metavar="FILE.safetensors",
        help="weights after block fine-tuning (default with --epochs: OUTPUT.weights.safetensors)",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="do not go on from where a stopped search was; with --absorb, or with --dynamic and "
        "--masks, every call begins anew",
    )
    common.add_data_arguments(parser, samples=SAMPLES)
    common.add_run_arguments(parser, precision="of the search", precisions=("float32",))
    budget = parser.add_argument_group("budget").add_mutually_exclusive_group()
    _add_budget(budget)
    _add_search(parser.add_argument_group("search"))
    _dps.add_arguments(parser, budget)
    _absorb.add_arguments(parser)


def _add_budget(group: argparse._MutuallyExclusiveGroup) -> None:
    group.add_argument(
        "--tolerance",
        type=number(above=0),
        metavar="T",
        help=f"largest relative error of a block (default {TOLERANCE})",
    )
    group.add_argument(
        "--cut", type=number(above=0, below=1), metavar="X", help="share of the MACs to save"
    )
    group.add_argument(
        "--speedup",
        type=number(above=1),
        metavar="X",
        help="images per second over the dense model's, measured on this device",
    )
    group.add_argument(
        "--counts",
        type=kept_counts,
        metavar="n1,…,nL",
        help="tokens that each block keeps, the last one what the head reads: 1, or 2 if distilled",
    )


def _add_search(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--uniform", action="store_true", help="with --cut: as many tokens in every block"
    )
    group.add_argument(
        "--granularity",
        type=whole_number(1),
        metavar="R",
        help=f"tokens added per step (default {GRANULARITY})",
    )
    group.add_argument(
        "--epochs",
        type=whole_number(0),
        default=0,
        metavar="E",
        help="of block fine-tuning per step (default 0: the weights stay); for predictors there is "
        "--predictor-epochs",
    )
    group.add_argument(
        "--lr",
        type=number(above=0),
        metavar="X",
        help=f"learning rate of block fine-tuning (default {LR:g})",
    )
    group.add_argument(
        "--score",
        default="eq6",
        metavar="NAME",
        help=f"rates the tokens: {', '.join(SCORES)}, or FILE.py:FUNCTION of your own, which takes "
        "a slimvit.search.LayerView (default eq6)",
    )
    group.add_argument(
        "--semantics",
        choices=SEMANTICS,
        default="drop",
        help="what a pruned token is to later blocks (default drop)",
    )
    group.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="N", help="of shuffling (default 0)"
    )
    size = group.add_mutually_exclusive_group()
    size.add_argument(
        "--cache-gb",
        type=number(least=0, most=1e6),
        default=1.0,
        metavar="X",
        help="memory for the images' features in GiB; the rest goes to a temporary folder "
        "(default 1)",
    )
    size.add_argument(
        "--cache-bytes", type=whole_number(0, 2**50), metavar="N", help="the same in bytes"
    )


def run(args: argparse.Namespace) -> int:
    """Search, save the masks and what was tuned, print a table, write the JSON."""
    _check(args)
    with common.processes(args) as shard:
        model = common.load_model(args, need_weights=True)
        images = common.load_images(args, model, shard=shard)
        if args.absorb:
            _absorb.run(args, model, images)
            return 0
        if args.masks is not None:
            _dps.run(args, model, images, _read_masks(args, model))
            return 0
        state = _state_beside(args.output)
        start = time.perf_counter()
        try:
            result = search(
                model,
                images,
                state=state,
                keep_state=True,
                restart=args.restart,
                progress=sys.stderr.isatty(),
                **_options(args) | {"score": args.rates},
            )
            seconds = time.perf_counter() - start
            if common.is_first():
                _save(args, model, images, result, seconds)
            if args.dynamic:
                _dps.run(args, model, images, result.masks)
        except (KeyboardInterrupt, SystemExit):
            if state.exists():
                common.warn(f"stopped; the same command goes on from {state}")
            raise
        if common.is_first():
            state.unlink(missing_ok=True)  # not before what was found is on disk
    return 0


def _read_masks(args: argparse.Namespace, model: nn.Module) -> Masks:
    masks = common.fit_masks(Masks.load(args.masks), spec(model))
    if masks.semantics != "drop":
        raise UsageError(f"--dynamic needs masks with semantics drop, got {masks.semantics}")
    return masks


def _check(args: argparse.Namespace) -> None:
    common.check_output("--output", args.output)
    if args.weights_output is not None and args.epochs == 0:
        raise UsageError("--weights-output needs --epochs >= 1: without, the weights stay")
    if args.lr is not None and args.epochs == 0:
        raise UsageError("--lr needs --epochs >= 1: without, the weights stay")
    if args.uniform and args.cut is None:
        raise UsageError("--uniform needs --cut")
    _dps.check(args)
    _absorb.check(args)
    args.rates = _own_code.read_score(args.score)
    if _searches(args):
        refuse_device("--output", args.output, "the state of the search")
    if args.weights_output is None and args.epochs > 0:
        args.weights_output = common.weights_beside(args.output)
    common.check_outputs(args, _outputs(args))


def _outputs(args: argparse.Namespace) -> dict[str, Path | None]:
    """What is written, by the flag or the words that name it."""
    outputs = {flag: getattr(args, flag[2:].replace("-", "_")) for flag in _OUTPUTS}
    if _searches(args):
        outputs["the state of the search"] = _state_beside(args.output)
        if args.dynamic:
            outputs["the masks beside --output"] = _dps.masks_beside(args.output)
    return outputs


def _searches(args: argparse.Namespace) -> bool:
    return args.masks is None and not args.absorb


def _state_beside(output: Path) -> Path:
    return output.with_name(f"{output.stem}.search.safetensors")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    names = ("tolerance", "cut", "speedup", "counts", "uniform", "score", "granularity")
    options = {name: getattr(args, name) for name in (*names, "epochs", "lr", "semantics", "seed")}
    if all(options[name] is None for name in ("tolerance", "cut", "speedup", "counts")):
        options["tolerance"] = TOLERANCE
    for name, usual in (("granularity", GRANULARITY), ("lr", LR)):
        options[name] = usual if options[name] is None else options[name]
    size = args.cache_bytes
    options["cache_bytes"] = int(args.cache_gb * 2**30) if size is None else size
    return options


def _save(
    args: argparse.Namespace, model: nn.Module, images: Batches, result: Result, seconds: float
) -> None:
    masks, shape = result.masks, spec(model)
    if result.model is not None:
        save_weights(args.weights_output, result.model, {"model": args.model})
    output = _dps.masks_beside(args.output) if args.dynamic else args.output
    masks.save(output)
    values = {
        "model": args.model,
        "kept": list(masks.counts),
        "cut": result.cut,
        "errors": [entry.error for entry in result.report],
        "seconds": seconds,
        "gmacs": gmacs(shape, masks),
        "dense_gmacs": gmacs(shape),
        "images": len(images.dataset) - len(images.dataset.skipped),
        "skipped": len(images.dataset.skipped),
        "data": images.dataset.fingerprint,
        "output": str(output),
        "weights": str(args.weights_output) if result.model is not None else None,
        "blocks": [vars(entry) for entry in result.report],
        "options": _options(args),
    }
    lines = [describe(args.model, result, values), f"wrote {output}"]
    if result.model is not None:
        lines.append(f"wrote {args.weights_output}: the masks belong to these weights")
    with common.then_say("\n".join(lines)):
        if args.json is not None and not args.dynamic:
            common.write_json(args.json, values)


def describe(name: str, result: Result, values: dict[str, Any]) -> str:
    """A table with one row a block, and the cut in a line."""
    tokens = result.masks.tokens
    rows = [
        (f"block {b.layer}", b.kept, f"{100 * b.kept / tokens:.0f} %", f"{b.error:.4f}", b.steps,
         f"{b.seconds:.1f}")
        for b in result.report
    ]  # fmt: skip
    return "\n".join(
        [
            common.table(rows, (name, "kept", f"of {tokens}", "error", "steps", "seconds")),
            "",
            f"{100 * result.cut:.1f} % fewer MACs: {values['gmacs']:.3f} G of "
            f"{values['dense_gmacs']:.3f} G an image; {values['images']} images, "
            f"{values['seconds']:.0f} s",
        ]
    )
