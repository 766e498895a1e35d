"""slimvit show: the kept patches of a masks file, block by block, as a table and as pictures."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import TYPE_CHECKING

from slimvit.errors import DataError, SlimvitError, UsageError
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
        if path is not None:
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
    drawn = {path: render(figure, path) for path, figure in figures.items()}
    print(describe(masks))
    for path, content in drawn.items():
        atomic_write(path, content)
        print(f"wrote {path}")
    return 0


def describe(masks: Masks) -> str:
    """What the masks are in one line, and a table with one row a block."""
    prefix = f"{masks.prefix} prefix token{'' if masks.prefix == 1 else 's'}"
    name = masks.model or "unnamed model"
    patches = f"{masks.grid[0]} x {masks.grid[1]} patches"
    lines = [f"{name}: {patches} and {prefix}, pruned tokens: {masks.semantics}", ""]
    errors = "" if masks.errors is None else "     error"
    lines.append(f"block  kept  of {masks.tokens}{errors}")
    for block, count in enumerate(masks.counts):
        error = "" if masks.errors is None else f"  {masks.errors[block].item():8.4f}"
        lines.append(f"{block + 1:5d} {count:5d}  {100 * count / masks.tokens:4.0f} %{error}")
    return "\n".join(lines)


def render(figure: Figure, path: Path) -> bytes:
    """The picture file's content, in the format of the path's suffix."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower())
    return buffer.getvalue()


def _check_path(flag: str, path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{flag} must end in {', '.join(SUFFIXES)}, got {path}")
    if not path.absolute().parent.is_dir():
        raise SlimvitError(f"{flag}: the folder {path.absolute().parent} does not exist")


def _read(path: Path) -> Image:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"--image {path} cannot be read as an image: {error}") from error
