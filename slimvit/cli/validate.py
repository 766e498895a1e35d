"""slimvit validate: how the pruned model answers, beside the dense one, on the same images."""

from __future__ import annotations

import argparse

from slimvit.cli import common
from slimvit.evaluate import Evaluation, evaluate
from slimvit.macs import gmacs, mean_gmacs, paper_gmacs
from slimvit.models import spec
from slimvit.runtime import accelerate

HELP = "top-1, top-5 and agreement of the pruned model with the dense one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `slimvit validate`."""
    common.add_model_arguments(parser)
    common.add_masks_arguments(parser)
    common.add_data_arguments(parser)
    common.add_run_arguments(parser)
    parser.add_argument(
        "--backend",
        default="auto",
        choices=("auto", *common.backends()),
        help="what computes the pruned model (default auto; slimvit doctor tells what works)",
    )


def run(args: argparse.Namespace) -> int:
    """Run both models over the images, print a table, write the JSON."""
    common.check_outputs(args, {"--json": args.json})
    dense = common.load_model(args, need_weights=True)
    masks = common.load_masks(args, dense)
    weights = common.load_slim_weights(args, dense)
    slim = accelerate(weights, masks, backend=args.backend, precision=args.precision)
    images = common.load_images(args, dense)
    found = evaluate(dense, slim, images, progress=True)
    shape = spec(dense)
    executed = mean_gmacs(shape, masks, slim, images)
    values = {
        "model": args.model,
        "images": found.images,
        "top1": found.top1,
        "top5": found.top5,
        "dense_top1": found.dense_top1,
        "dense_top5": found.dense_top5,
        "agreement": found.agreement,
        "divergence": found.divergence,
        "cosine": found.cosine,
        "gmacs": executed,
        "dense_gmacs": gmacs(shape),
        "paper_gmacs": None if getattr(masks, "ragged", False) else paper_gmacs(shape, masks),
        "cut": 1 - executed / gmacs(shape),
        "kept": list(masks.counts),
        "semantics": masks.semantics,
        "plan": common.plan_kind(masks),
        "labelled": found.labelled,
        "skipped": len(images.dataset.skipped),
        "backend": slim.backend,
        "precision": slim.precision,
        "device": str(next(dense.parameters()).device),
    }
    with common.then_say(describe(args.model, found, values)):
        if args.json is not None:
            common.write_json(args.json, values)
    if not images.dataset.labelled:
        common.warn(f"no top-1 and top-5, only agreement: {images.dataset.why_unlabelled}")
    return 0


def describe(model: str, found: Evaluation, values: dict) -> str:
    """A table with one column for the dense model and one for the pruned one."""
    rows = [
        ("top-1", _percent(found.dense_top1), _percent(found.top1)),
        ("top-5", _percent(found.dense_top5), _percent(found.top5)),
        ("GMACs an image", f"{values['dense_gmacs']:.3f}", f"{values['gmacs']:.3f}"),
        ("by the papers' formula", f"{values['dense_gmacs']:.3f}", _number(values["paper_gmacs"])),
        ("computes in", "float32, torch", f"{values['precision']}, {values['backend']}"),
    ]
    agreement = f"cosine of the features {found.cosine:.4f}"
    if found.agreement is not None:
        agreement = f"same answer on {found.agreement:.1f} % of the images"
        agreement += f", KL(dense, slim) {found.divergence:.4f}"
    plan = "" if values["plan"] == "static" else f" by {values['plan']}"
    return "\n".join(
        [
            common.table(rows, (model, "dense", "slim")),
            "",
            f"{found.images} images, {100 * values['cut']:.1f} % fewer MACs{plan}, {agreement}",
        ]
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"
