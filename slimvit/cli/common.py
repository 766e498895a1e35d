"""What the commands share: flags, loading, tables and JSON files."""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slimvit.cli import _own_code
from slimvit.cli._arguments import (
    add_data_arguments,
    add_kept_arguments,
    add_masks_arguments,
    add_model_arguments,
    add_run_arguments,
)
from slimvit.cli._outputs import (
    check_output,
    check_outputs,
    is_first,
    say,
    then_say,
    warn,
    write_json,
)
from slimvit.cli._types import kept_counts, number, whole_number
from slimvit.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from slimvit.data import Batches
    from slimvit.dynamic import Planner
    from slimvit.masks import Masks
    from slimvit.models import Spec

__all__ = [
    "add_data_arguments",
    "add_kept_arguments",
    "add_masks_arguments",
    "add_model_arguments",
    "add_run_arguments",
    "backends",
    "check_output",
    "check_outputs",
    "device",
    "fit_masks",
    "is_first",
    "kept_counts",
    "load_images",
    "load_masks",
    "load_model",
    "load_slim_weights",
    "number",
    "plan_kind",
    "processes",
    "read_masks",
    "say",
    "table",
    "then_say",
    "warn",
    "warn_of_tuned_weights",
    "weights_beside",
    "whole_number",
    "write_json",
]


def backends() -> tuple[str, ...]:
    """Names for --backend."""
    from slimvit.backends import NAMES

    return NAMES


def device(args: argparse.Namespace) -> torch.device:
    """The device of --device, checked; under torchrun each process takes the GPU of its rank.

    Raises:
        UsageError: there is no such device here.
    """
    import torch

    wanted = getattr(args, "device", None)
    name = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        found = torch.device(name)
        torch.empty(1, device=found)
        if found.type == "meta":
            raise RuntimeError("it holds no data")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"--device {wanted or name} is not available here: {reason}") from error
    if found.type == "cuda":
        torch.cuda.set_device(found)
    return found


def load_model(
    args: argparse.Namespace, *, checkpoint: Path | None = None, need_weights: bool = False
) -> nn.Module:
    """The timm model of the flags, in evaluation mode, on the device of the flags.

    Args:
        args: with `add_model_arguments` and `add_run_arguments`.
        checkpoint: weights to take instead of those of the flags.
        need_weights: warn where neither --checkpoint nor --pretrained is given.
    """
    from slimvit import models

    where = device(args)
    if need_weights and not (checkpoint or args.checkpoint or args.pretrained):
        warn("neither --checkpoint nor --pretrained is given: the weights are random")
    model = models.create(
        args.model,
        checkpoint=checkpoint or args.checkpoint,
        pretrained=args.pretrained and checkpoint is None,
        img_size=args.img_size,
        num_classes=args.num_classes,
    )
    return model.to(where)


def load_masks(args: argparse.Namespace, model: nn.Module) -> Masks | Planner:
    """What --masks or --absorb says: masks that fit the model, or a plan bound to it."""
    from slimvit import models

    return fit_masks(read_masks(args), models.spec(model))


def read_masks(args: argparse.Namespace) -> Masks | Planner:
    """What --masks or --absorb says, of whatever model."""
    from slimvit.dynamic import Absorb, load_plan

    _own_code.load_imports(args)
    return load_plan(args.masks) if args.masks is not None else Absorb(args.absorb)


def fit_masks(kept: Masks | Planner, shape: Spec) -> Masks | Planner:
    """Masks as they are, once checked against the model; a plan bound to it."""
    from slimvit import models
    from slimvit.masks import Masks

    if not isinstance(kept, Masks):
        return kept.bind(shape)
    models.check_masks(kept, shape)
    return kept


def plan_kind(kept: Masks | Planner) -> str:
    """How tokens are chosen: static, absorb, dps, spvit or a planner's own name."""
    return getattr(kept, "kind", "static")


def load_slim_weights(args: argparse.Namespace, dense: nn.Module) -> nn.Module:
    """The dense model with the weights of --slim-checkpoint; itself where there are none."""
    from slimvit import models

    warn_of_tuned_weights(args)
    if args.slim_checkpoint is None:
        return dense
    slim = copy.deepcopy(dense)
    models.load_checkpoint(slim, args.slim_checkpoint)
    return slim


def warn_of_tuned_weights(args: argparse.Namespace) -> None:
    """Where --slim-checkpoint is not given, name the weights that belong to --masks."""
    if args.slim_checkpoint is None:
        for tuned in tuned_beside(args.masks):
            warn(f"--slim-checkpoint is not given, but there are tuned weights: {tuned}")


def tuned_beside(masks: Path | None) -> list[Path]:
    """Weights that a search with block fine-tuning, or `finetune` with a plan, put beside them."""
    if masks is None:
        return []
    beside = [weights_beside(masks)]
    if masks.name.endswith(".plan.safetensors"):
        beside.append(masks.with_name(masks.name.replace(".plan.", ".")))
    return [path for path in beside if path.exists()]


def weights_beside(masks: Path) -> Path:
    """Where a search with block fine-tuning puts the weights that belong to its masks."""
    return masks.with_name(f"{masks.stem}.weights.safetensors")


def load_images(
    args: argparse.Namespace,
    model: nn.Module,
    *,
    subset: str | None = None,
    training: bool = False,
    shard: tuple[int, int] = (0, 1),
    seed: int = 0,
) -> Batches:
    """The images of the flags in batches; in training augmented, shuffled and in step.

    Args:
        args: with `add_data_arguments` and `add_run_arguments`.
        model: decides on the transform, and on labels by its number of classes.
        subset: instead of --subset and --samples.
        training: augment and shuffle.
        shard: (rank, world).
        seed: of the shuffling.
    """
    from slimvit import models
    from slimvit.data import ImageFolder, image_transform, loader

    spec = models.spec(model)
    images = ImageFolder(
        args.data_dir,
        getattr(args, "class_map", None),
        subset=subset if subset is not None else args.subset,
        samples=args.samples if subset is None else None,
        transform=image_transform(model, training),
        num_classes=spec.num_classes,
        mode="L" if spec.in_chans == 1 else "RGB",
    )
    workers = args.workers
    if workers is None:
        workers = min(4, (os.cpu_count() or 1) // 2) if device(args).type == "cuda" else 0
    shuffle_seed = seed if training else None
    return loader(
        images, args.batch_size, workers, shard, shuffle_seed=shuffle_seed, keep_empty=training
    )


@contextlib.contextmanager
def processes(args: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Join the processes of torchrun, with nccl on GPUs, else gloo: (rank, world)."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0, 1
        return
    import torch.distributed as dist

    dist.init_process_group("nccl" if device(args).type == "cuda" else "gloo")
    yield dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Rows under a header, columns aligned: the first to the left, the rest to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]

    def line(row: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))
        return "  ".join([row[0].ljust(widths[0]), *rest]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])
