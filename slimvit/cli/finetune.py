"""slimvit finetune: distil the dense model into the pruned one."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimvit.cli import common
from slimvit.cli.common import number, whole_number
from slimvit.errors import UsageError
from slimvit.finetune import Settings, finetune
from slimvit.macs import cut
from slimvit.models import spec
from slimvit.runtime import apply_masks

if TYPE_CHECKING:
    from slimvit.data import Batches
    from slimvit.finetune import Result

HELP = "fine-tune a pruned model by distillation from the dense one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `slimvit finetune`."""
    common.add_model_arguments(parser)
    common.add_masks_arguments(parser)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.safetensors",
        help="weights in timm's names, written after each epoch; a run that was stopped goes on "
        "when called again",
    )
    parser.add_argument("--restart", action="store_true", help="start over instead")
    common.add_data_arguments(parser)
    parser.add_argument(
        "--val-subset",
        metavar="START:STOP",
        help="slice of the sorted list of images to validate on after each epoch",
    )
    common.add_run_arguments(parser, precision="the same as --amp; float32 is --amp none")
    _add_settings(parser.add_argument_group("training"))


def _add_settings(group: argparse._ArgumentGroup) -> None:
    fields = {field.name: field.default for field in dataclasses.fields(Settings)}

    def add(name: str, kind: Any, text: str, metavar: str = "X") -> None:
        flag, default = "--" + name.replace("_", "-"), fields[name]
        text += "" if default is None else f" (default {default})"
        group.add_argument(flag, type=kind, default=default, metavar=metavar, help=text)

    add("epochs", whole_number(0), "passes over the images", "N")
    add("lr", number(above=0), "learning rate at its highest")
    add("weight_decay", number(least=0), "AdamW's weight decay")
    add("warmup_epochs", number(least=0), "epochs of warm-up, at most half of all")
    add("min_lr", number(least=0, most=1), "where the cosine ends, as a fraction of --lr")
    add("temperature", number(above=0), "temperature of the distillation")
    add("alpha", number(least=0, most=1), "weight of the labels; the dense model has the rest")
    add("clip", number(least=0), "largest norm of the gradient, 0 for any")
    add("ema_decay", number(above=0, below=1), "average the weights with this decay")
    add("seed", whole_number(0), "seed of shuffling and augmentation", "N")
    group.add_argument(
        "--amp",
        choices=("auto", "bfloat16", "float16", "none"),
        default="auto",
        help="mixed precision (default auto: bfloat16 where the hardware has it)",
    )


def run(args: argparse.Namespace) -> int:
    """Fine-tune, write the weights and the JSON, print what was gained."""
    if args.precision is not None:
        args.amp = "none" if args.precision == "float32" else args.precision
    common.check_output("--output", args.output)
    common.check_output("--json", args.json)
    if args.output.suffix != ".safetensors":
        raise UsageError(f"--output must end in .safetensors, got {args.output}")
    with common.processes(args) as (rank, world):
        dense = common.load_model(args, need_weights=True)
        masks = common.load_masks(args, dense)
        images = common.load_images(args, dense, training=True, shard=(rank, world), seed=args.seed)
        checks = None
        if args.val_subset is not None:
            checks = common.load_images(args, dense, subset=args.val_subset, shard=(rank, world))
            _warn_of_overlap(images, checks)
        if args.alpha > 0 and not images.dataset.labelled:
            common.warn(f"--alpha has no effect, no labels: {images.dataset.why_unlabelled}")
        result = finetune(
            apply_masks(common.load_slim_weights(args, dense), masks),
            dense,
            images,
            val_loader=checks,
            output=args.output,
            restart=args.restart,
            info={
                "model": args.model,
                "data": images.dataset.fingerprint,
                "batch_size": args.batch_size,
            },
            on_epoch=lambda entry: common.say(_line(entry, args.epochs)),
            **{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)},
        )
        if common.is_first():
            _report(args, result, images, cut(spec(dense), masks))
    return 0


def _report(args: argparse.Namespace, result: Result, images: Batches, saved: float) -> None:
    common.say(f"wrote {args.output}")
    if args.json is None:
        return
    values = {
        "model": args.model,
        "images": len(images.dataset),
        "skipped": len(images.dataset.skipped),
        "labelled": images.dataset.labelled,
        "cut": saved,
        "output": str(args.output),
    }
    common.write_json(args.json, values | result.report)


def _line(entry: dict[str, Any], epochs: int) -> str:
    parts = [f"epoch {entry['epoch']}/{epochs}"]
    if "loss" in entry:
        parts += [f"loss {entry['loss']:.4f}", f"{entry['seconds']:.0f} s"]
    for key, name in (("agreement", "agreement"), ("top1", "top-1"), ("dense_top1", "dense top-1")):
        if entry.get(key) is not None:
            parts.append(f"{name} {entry[key]:.1f} %")
    return "  ".join(parts)


def _warn_of_overlap(images: Batches, checks: Batches) -> None:
    shared = set(images.dataset.positions) & set(checks.dataset.positions)
    if shared:
        common.warn(
            f"{len(shared)} images of --val-subset are trained on, too: give --subset the others"
        )
