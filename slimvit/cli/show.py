"""slimvit show: the kept patches of a masks file, block by block, as a table and as pictures."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import TYPE_CHECKING

from slimvit.cli import common
from slimvit.errors import DataError, UsageError
from slimvit.files import atomic_write
from slimvit.masks import Masks

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

HELP = "draw the kept patches of a masks file, block by block"
SUFFIXES = (".png", ".pdf", ".svg", ".jpg", ".jpeg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `slimvit show`."""
    parser.add_argument("--masks", required=True, metavar="FILE", help="masks to show")
    parser.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        help="image to draw them on; plain squares without one",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.png", help="picture of the kept patches to write"
    )
    parser.add_argument(
        "--pyramid", type=Path, metavar="FILE.png", help="picture of the kept counts to write"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table of kept counts and write the pictures asked for."""
    for flag, path in (("--output", args.output), ("--pyramid", args.pyramid)):
        _check_path(flag, path)
    if args.image is not None and args.output is None:
        raise UsageError("--image needs --output, the picture to write")
    masks = Masks.load(args.masks)
    image = None if args.image is None else _read(args.image)
    figures: dict[Path, Figure] = {}
    if args.output is not None:
        figures[args.output] = masks.plot(image)
    if args.pyramid is not None:
        figures[args.pyramid] = masks.plot_pyramid()
    drawn = {path: render(figure, path.suffix) for path, figure in figures.items()}
    common.say(describe(masks))
    for path, content in drawn.items():
        atomic_write(path, content)
        common.say(f"wrote {path}")
    return 0


def describe(masks: Masks) -> str:
    """What the masks are in one line, and a table with one row a block."""
    prefix = f"{masks.prefix} prefix token{'' if masks.prefix == 1 else 's'}"
    name = masks.model or "unnamed model"
    patches = f"{masks.grid[0]} x {masks.grid[1]} patches"
    header = ["block", "kept", f"of {masks.tokens}"]
    rows: list[list[object]] = [
        [block + 1, count, f"{100 * count / masks.tokens:.0f} %"]
        for block, count in enumerate(masks.counts)
    ]
    if masks.errors is not None:
        header.append("error")
        for row, error in zip(rows, masks.errors.tolist(), strict=True):
            row.append(f"{error:.4f}")
    return f"{name}: {patches} and {prefix}, pruned tokens: {masks.semantics}\n\n" + common.table(
        rows, header
    )


def render(figure: Figure, suffix: str) -> bytes:
    """The picture file's content, in the format of the suffix, one of SUFFIXES."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix[1:].lower())
    return buffer.getvalue()


def _check_path(flag: str, path: Path | None) -> None:
    if path is not None and path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{flag} must end in {', '.join(SUFFIXES)}, got {path}")
    common.check_output(flag, path)


def _read(path: Path) -> Image:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"--image {path} cannot be read as an image: {error}") from error
