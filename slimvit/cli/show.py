"""slimvit show: the kept patches of masks or of a plan, block by block, in table and picture."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from slimvit.cli import common
from slimvit.errors import DataError, UsageError
from slimvit.files import atomic_write
from slimvit.macs import cut
from slimvit.masks import Masks

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image
    from torch import nn

    from slimvit.dynamic import Planner
    from slimvit.models import Spec

HELP = "draw the kept patches of a masks file or a plan, block by block"
SUFFIXES = (".png", ".pdf", ".svg", ".jpg", ".jpeg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `slimvit show`."""
    common.add_kept_arguments(parser)
    common.add_model_arguments(parser, required=False)
    parser.set_defaults(device="cpu")
    parser.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        help="image to draw them on; masks are drawn as plain squares without one. A dynamic plan "
        "needs one, whose patches --model chooses",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.png", help="picture of the kept patches to write"
    )
    parser.add_argument(
        "--pyramid", type=Path, metavar="FILE.png", help="picture of the kept counts to write"
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FILE.safetensors",
        help="write the plan with its counts for --model, for --masks of other commands",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table of kept counts and write the files asked for."""
    outputs = {"--output": args.output, "--pyramid": args.pyramid, "--save": args.save}
    for flag in ("--output", "--pyramid"):
        _check_suffix(flag, outputs[flag])
    common.check_outputs(args, outputs)
    if args.image is not None and args.output is None:
        raise UsageError("--image needs --output, the picture to write")
    kept = common.read_masks(args)
    if isinstance(kept, Masks):
        return _show_masks(args, kept)
    return _show_plan(args, kept)


def _show_masks(args: argparse.Namespace, masks: Masks) -> int:
    if args.save is not None:
        raise UsageError(f"--save writes dynamic plans, {args.masks} holds masks")
    if args.model is not None:
        common.fit_masks(masks, _spec(common.load_model(args)))
    image = None if args.image is None else _read(args.image)
    figures: dict[Path, Figure] = {}
    if args.output is not None:
        figures[args.output] = masks.plot(image)
    if args.pyramid is not None:
        figures[args.pyramid] = masks.plot_pyramid()
    _write(masks, figures)
    return 0


def _show_plan(args: argparse.Namespace, plan: Planner) -> int:
    from slimvit.dynamic.plot import plot_counts

    if args.model is None and (plan.spec is None or args.image is not None):
        what = "--image" if args.image is not None else "a plan of no model yet"
        raise UsageError(f"{what} needs --model, which chooses the patches")
    if args.output is not None and args.image is None:
        raise UsageError("--output needs --image: each image keeps patches of its own")
    figures: dict[Path, Figure] = {}
    if args.model is not None:
        model = common.load_model(args, need_weights=args.output is not None)
        plan = plan.bind(_spec(model))
        if args.output is not None:
            figures[args.output] = _plot_image(model, plan, args.image)
    if args.pyramid is not None:
        figures[args.pyramid] = plot_counts(plan)
    _write(plan, figures, args.save)
    return 0


def _plot_image(model: nn.Module, plan: Planner, path: Path) -> Figure:
    """The patches that the plan keeps of an image, drawn on what the model sees of it."""
    from slimvit.data import image_transform
    from slimvit.dynamic.plot import plot_kept
    from slimvit.runtime import apply_masks

    transform = image_transform(model)
    mode = "L" if _spec(model).in_chans == 1 else "RGB"
    image = transform(_read(path, mode))
    normalise = transform.transforms[-1]
    mean, std = (
        torch.as_tensor(values).view(-1, 1, 1) for values in (normalise.mean, normalise.std)
    )
    return plot_kept(apply_masks(model, plan), image[None], (image * std + mean).clamp(0, 1))


def _write(kept: Masks | Planner, figures: dict[Path, Figure], save: Path | None = None) -> None:
    """Write the pictures, and the plan to `save`; then print the table of kept counts."""
    drawn = {path: render(figure, path.suffix) for path, figure in figures.items()}
    for path, content in drawn.items():
        atomic_write(path, content)
    if save is not None:
        kept.save(save)
    written = [*drawn, *([] if save is None else [save])]
    common.say("\n".join([describe(kept), *(f"wrote {path}" for path in written)]))


def _spec(model: nn.Module) -> Spec:
    from slimvit.models import spec

    return spec(model)


def describe(kept: Masks | Planner) -> str:
    """What the masks or the plan are in one line, and a table with one row a block."""
    prefix = f"{kept.prefix} prefix token{'' if kept.prefix == 1 else 's'}"
    patches = f"{kept.grid[0]} x {kept.grid[1]} patches"
    header = ["block", "kept", f"of {kept.tokens}"]
    rows: list[list[object]] = [
        [block + 1, count, f"{100 * count / kept.tokens:.0f} %"]
        for block, count in enumerate(kept.counts)
    ]
    if isinstance(kept, Masks):
        name, how = kept.model or "unnamed model", f"pruned tokens: {kept.semantics}"
        if kept.errors is not None:
            header.append("error")
            for row, error in zip(rows, kept.errors.tolist(), strict=True):
                row.append(f"{error:.4f}")
    else:
        name, how = kept.spec.name, f"chosen for each image: {kept.kind}"
        how += f", {100 * cut(kept.spec, kept):.1f} % fewer MACs"
    return f"{name}: {patches} and {prefix}, {how}\n\n" + common.table(rows, header)


def render(figure: Figure, suffix: str) -> bytes:
    """The picture file's content, in the format of the suffix, one of SUFFIXES."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix[1:].lower())
    return buffer.getvalue()


def _check_suffix(flag: str, path: Path | None) -> None:
    if path is not None and path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{flag} must end in {', '.join(SUFFIXES)}, got {path}")


def _read(path: Path, mode: str = "RGB") -> Image:
    from PIL.Image import DecompressionBombError

    from slimvit.images import read_image

    try:
        return read_image(path, mode)
    except (OSError, SyntaxError, ValueError, DataError, DecompressionBombError) as error:
        raise DataError(f"--image {path} cannot be read as an image: {error}") from error
