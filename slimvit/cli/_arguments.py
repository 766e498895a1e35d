"""Flags that the commands share, with timm's names."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from slimvit.cli._types import json_file, number, whole_number

PRECISIONS = ("float32", "bfloat16", "float16")


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add --model, --pretrained, --checkpoint, --img-size and --num-classes."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=required, metavar="NAME", help="timm's name of it")
    weights = group.add_mutually_exclusive_group()
    weights.add_argument(
        "--pretrained", action="store_true", help="timm's weights, downloaded from the hub"
    )
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights, safetensors")
    group.add_argument("--img-size", type=whole_number(1), metavar="N", help="image side in pixels")
    group.add_argument(
        "--num-classes", type=whole_number(0), metavar="N", help="outputs of the head"
    )


def add_kept_arguments(
    parser: argparse.ArgumentParser, required: bool = True
) -> argparse._MutuallyExclusiveGroup:
    """Add --import, and --masks and --absorb, one of which is given; their group, for more."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE.py",
        help="Python file, or installed module, that defines the planner of --masks, where that is "
        "one of your own; may be repeated",
    )
    kept = parser.add_mutually_exclusive_group(required=required)
    kept.add_argument(
        "--masks", type=Path, metavar="FILE", help="masks file, or the file of a dynamic plan"
    )
    kept.add_argument(
        "--absorb",
        type=number(above=0, below=1),
        metavar="CUT",
        help="no file: patches chosen for each image without any training, the others absorbed, "
        "CUT of the multiply-accumulates saved, such as 0.45",
    )
    return kept


def add_masks_arguments(
    parser: argparse.ArgumentParser, required: bool = True
) -> argparse._MutuallyExclusiveGroup:
    """Add --masks, --absorb and --slim-checkpoint; the group of the first two."""
    kept = add_kept_arguments(parser, required)
    parser.add_argument(
        "--slim-checkpoint",
        type=Path,
        metavar="FILE",
        help="weights of the pruned model, from finetune or from prune --epochs; the dense one "
        "keeps its own",
    )
    return kept


def add_data_arguments(
    parser: argparse.ArgumentParser,
    required: bool = True,
    samples: int | None = None,
    labels: bool = True,
) -> None:
    """Add --data-dir, --subset, --samples (default `samples`), --workers; of labels --class-map."""
    group = parser.add_argument_group("images")
    group.add_argument(
        "--data-dir",
        type=Path,
        required=required,
        metavar="DIR",
        help="folder of images, or of class folders",
    )
    if labels:
        group.add_argument(
            "--class-map",
            type=Path,
            metavar="FILE",
            help="text file whose line i names the folder of class i; without it the sorted "
            "folders are the classes, where there are as many as the model has",
        )
    group.add_argument(
        "--subset", metavar="START:STOP", help="slice of the sorted list of images, such as 0:250"
    )
    group.add_argument(
        "--samples",
        type=whole_number(1),
        default=samples,
        metavar="N",
        help=f"N images, evenly spaced over it (default {samples or 'all'})",
    )
    group.add_argument(
        "--workers", type=whole_number(0), metavar="N", help="processes that decode images"
    )


def add_run_arguments(
    parser: argparse.ArgumentParser,
    batch_size: int = 32,
    precision: str = "of the slim model (default float32)",
    precisions: Sequence[str] = PRECISIONS,
) -> None:
    """Add -b/--batch-size, --device, --precision, --json and --debug."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "-b",
        "--batch-size",
        type=whole_number(1),
        default=batch_size,
        metavar="N",
        help=f"images a batch (default {batch_size})",
    )
    group.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1 … (default cuda if there is one)"
    )
    group.add_argument("--precision", choices=precisions, help=precision)
    group.add_argument(
        "--json",
        type=json_file,
        metavar="FILE",
        help="write the results as JSON; - is stdout, and what is printed goes to stderr",
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
