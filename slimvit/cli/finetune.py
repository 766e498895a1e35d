"""slimvit finetune: distil the dense model into the pruned one; train SPViT's selectors."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimvit.cli import _spvit, common
from slimvit.cli.common import number, whole_number
from slimvit.dynamic import Planner, SPViT
from slimvit.errors import UsageError
from slimvit.files import refuse_device
from slimvit.finetune import (
    Settings,
    finetune,
    plan_path,
    resume_path,
    spvit_settings,
)
from slimvit.macs import cut
from slimvit.models import spec
from slimvit.runtime import apply_masks

if TYPE_CHECKING:
    from torch import nn

    from slimvit.data import Batches
    from slimvit.finetune import Result
    from slimvit.masks import Masks

HELP = "fine-tune a pruned model by distillation from the dense one"
_LEARNING = ("keep_weight", "class_weight", "token_weight", "frozen_epochs", "backbone_rate")
_DISTILLING = ("temperature", "alpha")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `slimvit finetune`."""
    common.add_model_arguments(parser)
    kept = common.add_masks_arguments(parser)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.safetensors",
        help="weights in timm's names, written after each epoch; a run that was stopped goes on "
        "when called again; a dynamic plan goes beside them as FILE.plan.safetensors",
    )
    parser.add_argument("--restart", action="store_true", help="start over instead")
    common.add_data_arguments(parser)
    parser.add_argument(
        "--val-subset",
        metavar="START:STOP",
        help="slice of the sorted list of images to validate on after each epoch",
    )
    common.add_run_arguments(parser, precision="the same as --amp; float32 is --amp none")
    _spvit.add_arguments(parser, kept)
    _add_settings(parser.add_argument_group("training"))


def _add_settings(group: argparse._ArgumentGroup) -> None:
    fields = {field.name: field.default for field in dataclasses.fields(Settings)}

    def add(name: str, kind: Any, text: str, metavar: str = "X") -> None:
        usual = {"epochs": "; SPViT 30", "lr": "; SPViT 5e-4 for 512 images a batch"}.get(name, "")
        text += "" if fields[name] is None else f" (default {fields[name]}{usual})"
        group.add_argument(_flag(name), type=kind, metavar=metavar, help=text)

    add("epochs", whole_number(0), "passes over the images", "N")
    add("lr", number(above=0), "learning rate at its highest")
    add("weight_decay", number(least=0), "AdamW's weight decay")
    add("warmup_epochs", number(least=0), "epochs of warm-up, at most half of all")
    add("min_lr", number(least=0, most=1), "where the cosine ends, as a fraction of --lr")
    add("temperature", number(above=0), "without SPViT: temperature of the distillation")
    add(
        "alpha",
        number(least=0, most=1),
        "without SPViT: weight of the labels; the dense model has the rest",
    )
    add("clip", number(least=0), "largest norm of the gradient, 0 for any")
    add("keep_weight", number(least=0), "SPViT: weight of the kept shares")
    add(
        "class_weight", number(least=0), "SPViT: weight of the dense model's answers; labels have 1"
    )
    add("token_weight", number(least=0), "SPViT: weight of the dense model's tokens")
    add("frozen_epochs", whole_number(0), "SPViT: epochs in which selectors learn alone", "N")
    add("backbone_rate", number(least=0), "SPViT: the model's share of --lr after them")
    add(
        "ema_decay",
        number(above=0, below=1),
        "average the weights with a decay that rises to this one by timm's warm-up",
    )
    add("seed", whole_number(0), "seed of shuffling and augmentation", "N")
    group.add_argument(
        "--amp",
        choices=("auto", "bfloat16", "float16", "none"),
        help="mixed precision (default auto: bfloat16 where the hardware has it)",
    )


def run(args: argparse.Namespace) -> int:
    """Fine-tune, write the weights and the JSON, print what was gained."""
    _check(args)
    with common.processes(args) as (rank, world):
        _spvit.check(args, world)
        dense = common.load_model(args, need_weights=True)
        kept, latency = _kept(args, dense, world)
        settings = _settings(args, kept, world)
        shard, seed = (rank, world), settings["seed"]
        images = common.load_images(args, dense, training=True, shard=shard, seed=seed)
        checks = None
        if args.val_subset is not None:
            checks = common.load_images(args, dense, subset=args.val_subset, shard=shard)
            _warn_of_overlap(images, checks)
        if args.alpha and not images.dataset.labelled:
            common.warn(f"--alpha has no effect, no labels: {images.dataset.why_unlabelled}")
        result = finetune(
            apply_masks(common.load_slim_weights(args, dense), kept),
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
            on_epoch=lambda entry: common.say(_line(entry, settings["epochs"])),
            **settings,
        )
        if common.is_first():
            _report(args, result, images, cut(spec(dense), kept), _measure(latency, result))
    return 0


def _check(args: argparse.Namespace) -> None:
    amp = "none" if args.precision == "float32" else args.precision
    if None not in (amp, args.amp) and amp != args.amp:
        raise UsageError(
            f"--precision {args.precision} is --amp {amp}, got --amp {args.amp}: give one of them"
        )
    args.amp = amp or args.amp
    if args.output.suffix != ".safetensors":
        raise UsageError(f"--output must end in .safetensors, got {args.output}")
    refuse_device("--output", args.output, "what an unfinished run goes on from")
    common.check_outputs(args, _outputs(args))


def _check_settings(args: argparse.Namespace, kind: str, learns: bool) -> None:
    """Refuse settings that this kind of masks or plan leaves without effect."""
    for name in _LEARNING:
        if getattr(args, name) is not None and not learns:
            raise UsageError(f"{_flag(name)} needs a plan that learns, spvit, got {kind}")
    for name in _DISTILLING:
        if getattr(args, name) is not None and kind == SPViT.kind:
            raise UsageError(f"{_flag(name)} has no meaning with spvit, whose loss has none")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _outputs(args: argparse.Namespace) -> dict[str, Path | None]:
    """What is written, by the flag or the words that name it."""
    return {
        "--output": args.output,
        "--json": args.json,
        "the plan beside --output": plan_path(args.output),
        "what an unfinished run goes on from": resume_path(args.output),
    }


def _kept(
    args: argparse.Namespace, dense: nn.Module, world: int
) -> tuple[Masks | Planner, _spvit.Target | None]:
    """What --masks, --absorb or --spvit says, for the model, and the target of the latter."""
    if args.spvit is not None:
        _check_settings(args, SPViT.kind, SPViT.learns)
        return _spvit.make_plan(args, dense, world)
    kept = common.load_masks(args, dense)
    _check_settings(args, common.plan_kind(kept), getattr(kept, "learns", False))
    return kept, None


def _settings(args: argparse.Namespace, kept: Masks | Planner, world: int) -> dict[str, Any]:
    """The flags; where a plan has usual values of its own, these."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    usual = spvit_settings(args.batch_size * world) if isinstance(kept, SPViT) else {}
    missing = [name for name, value in given.items() if value is None]
    return given | {name: usual.get(name, getattr(Settings(), name)) for name in missing}


def _measure(latency: _spvit.Target | None, result: Result) -> dict[str, Any] | None:
    if latency is None:
        return None
    return latency.measure(result.model.dense(), result.model.plan)


def _report(
    args: argparse.Namespace,
    result: Result,
    images: Batches,
    saved: float,
    latency: dict[str, Any] | None,
) -> None:
    plan = plan_path(args.output) if "plan" in result.report else None
    values = {
        "model": args.model,
        "images": len(images.dataset),
        "skipped": len(images.dataset.skipped),
        "labelled": images.dataset.labelled,
        "cut": saved,
        "output": str(args.output),
    }
    if plan is not None:
        values["plan_output"] = str(plan)
    if latency is not None:
        values["latency"] = latency
    use = f"it as --slim-checkpoint with --masks {args.masks}"
    wrote = f"wrote {args.output}"
    if plan is not None:
        use, wrote = "them as --slim-checkpoint and --masks", f"{wrote} and {plan}"
    with common.then_say(f"{wrote}: give {use}"):
        if args.json is not None:
            common.write_json(args.json, values | result.report)


def _line(entry: dict[str, Any], epochs: int) -> str:
    parts = [f"epoch {entry['epoch']}/{epochs}"]
    if "loss" in entry:
        parts += [f"loss {entry['loss']:.4f}", f"{entry['seconds']:.0f} s"]
    if "shares" in entry:
        parts.append("kept " + "/".join(f"{share:.2f}" for share in entry["shares"]))
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
