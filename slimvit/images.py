"""PIL images with 8 bits a channel, as models and pictures take them."""

from __future__ import annotations

import os

import numpy
from PIL import Image

from slimvit.errors import DataError


def read_image(path: str | os.PathLike[str], mode: str = "RGB") -> Image.Image:
    """The image of a file as it is stored, decoded; see `convert`."""
    with Image.open(path) as file:
        return convert(file, mode)


def convert(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """The image in a mode of 8 bits a channel: 16 bits of grey become round(v / 257).

    Args:
        image: of any mode whose range of values is known.
        mode: "RGB" or "L".

    Raises:
        DataError: the image has 32 bits a pixel, whose range nothing tells.
    """
    # Older versions of PIL read 16 bits of a PNG file, which cannot hold more, as mode I.
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):
        grey = (numpy.asarray(image).astype(numpy.uint32) + 128) // 257
        image = Image.fromarray(grey.astype(numpy.uint8))
    elif image.mode in ("I", "F"):
        raise DataError(
            f"an image must have 8 or 16 bits a channel, got 32 (mode {image.mode}), "
            "of which nothing tells the range"
        )
    elif image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    return image.convert(mode)
