"""Pictures of masks: the kept patches over an image, and the pyramid of kept counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy
import torch
from PIL import Image

from slimvit.errors import DataError, SlimvitError
from slimvit.images import convert

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from slimvit.masks import Masks

COLUMNS = 6  # panels a row, at most
SIDE = 224  # about so many pixels for the longer side of a panel
FADE = 0.88  # how far a pruned patch moves towards white
INK, SOFT, BAR, BED = "#22303c", "#6b7885", "#1f77b4", "#e6ebf0"


def plot_layers(masks: Masks, image: object = None) -> Figure:
    """Draw one panel a block: computed patches in full colour, pruned ones faded away.

    Args:
        masks: the kept sets to draw.
        image: an array or tensor [H, W, 3] or [3, H, W], uint8 in [0, 255] or floating point (in
            [0, 1], or normalised: then stretched to it), or a PIL image; its middle is cut to the
            shape of the patch grid. Without one the patches are plain squares.

    Returns:
        A figure outside pyplot's state: `figure.savefig("kept.png")`.

    Raises:
        DataError: `image` is none of these.
        SlimvitError: matplotlib is not installed.

    Source: Patch Slimming (Tang et al., CVPR 2022), Figure 4.
    """
    canvas = fit(image, masks.grid)
    pictures = [faded(masks, canvas, block) for block in range(masks.depth)]
    bare = [not row[masks.prefix :].any() for row in masks.keep]
    return panels(pictures, masks.counts, bare, _headline(masks))


def panels(
    pictures: Sequence[numpy.ndarray], counts: Sequence[int], bare: Sequence[bool], title: str
) -> Figure:
    """One panel a block.

    Args:
        pictures: uint8 [H, W, 3] of each block.
        counts: n_1 … n_L.
        bare: of each block, whether it keeps no patch.
        title: above them all.
    """
    rows = math.ceil(len(pictures) / COLUMNS)
    columns = math.ceil(len(pictures) / rows)
    height = pictures[0].shape[0] / pictures[0].shape[1]
    figure = _figure(1.75 * columns, (1.75 * height + 0.23) * rows + 0.42)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for block, (axis, picture) in enumerate(zip(axes, pictures)):
        axis.imshow(picture, interpolation="antialiased")
        _label(axis, block, counts[block], bare[block])
    figure.suptitle(title, color=INK, fontsize=11)
    return figure


def plot_pyramid(masks: Masks) -> Figure:
    """Draw how many tokens each block computes, and how deep each patch lives.

    Args:
        masks: the kept sets to draw.

    Returns:
        A figure outside pyplot's state: bars of n_1 … n_L around a middle line, first block at the
        bottom, and a map of the patch grid with the deepest block that keeps each patch.

    Raises:
        SlimvitError: matplotlib is not installed.

    Source: Patch Slimming (Tang et al., CVPR 2022), Figure 5.
    """
    figure = _figure(9.2, _height(masks.depth))
    bars, lives = figure.subplots(1, 2, width_ratios=(1.35, 1))
    _bars(bars, masks.counts, masks.tokens)
    _lives(lives, masks)
    figure.suptitle(_headline(masks), color=INK, fontsize=11)
    return figure


def plot_counts(counts: Sequence[int], tokens: int, title: str) -> Figure:
    """Draw how many of `tokens` each block computes, n_1 … n_L: the left half of `plot_pyramid`."""
    figure = _figure(8.6, _height(len(counts)))
    _bars(figure.subplots(), counts, tokens)
    figure.suptitle(title, color=INK, fontsize=11)
    return figure


def _height(depth: int) -> float:
    return max(3.4, 0.24 * depth + 1.2)


def faded(masks: Masks, canvas: numpy.ndarray, block: int) -> numpy.ndarray:
    """The canvas with the patches that a block does not compute faded towards white.

    Args:
        masks: the kept sets.
        canvas: uint8 [grid[0] * c, grid[1] * c, 3], c pixels a patch side.
        block: 0 … L-1.

    Returns:
        uint8, the shape of `canvas`; pixels of kept patches are untouched.
    """
    return fade(canvas, masks.keep[block, masks.prefix :].view(masks.grid).numpy())


def fade(canvas: numpy.ndarray, kept: numpy.ndarray) -> numpy.ndarray:
    """The canvas [H, W, 3] with the patches that `kept`, booleans of the grid, leaves out pale."""
    cell = canvas.shape[0] // kept.shape[0]
    kept = kept.repeat(cell, 0).repeat(cell, 1)[:, :, None]  # [H, W, 1]
    grey = canvas.mean(2, keepdims=True)
    pale = 255 * FADE + (1 - FADE) * grey
    return numpy.where(kept, canvas, pale.astype(numpy.uint8))


def _label(axis: Axes, block: int, count: int, bare: bool) -> None:
    axis.set_title(f"block {block + 1}: {count}", color=INK, fontsize=9, pad=3)
    if bare:
        words = "class token only" if count == 1 else f"{count} prefix tokens only"
        axis.text(
            0.5,
            0.5,
            words,
            color=SOFT,
            fontsize=8,
            ha="center",
            va="center",
            transform=axis.transAxes,
        )


def _headline(masks: Masks) -> str:
    return headline(masks.model, masks.counts, masks.tokens, masks.prefix, masks.semantics)


def headline(model: str, counts: Sequence[int], tokens: int, prefix: int, words: str) -> str:
    """What a picture is of, in one line; `words` tell how tokens are pruned."""
    name = f"{model}: " if model else ""
    share = sum(counts) / (len(counts) * tokens)
    plural = "s" if prefix != 1 else ""
    return (
        f"{name}{100 * share:.0f} % of the tokens computed, "
        f"N = {tokens} with {prefix} prefix token{plural}, {words}"
    )


def _bars(axis: Axes, counts: Sequence[int], tokens: int) -> None:
    blocks = range(1, len(counts) + 1)
    axis.barh(blocks, [tokens] * len(counts), left=-tokens / 2, color=BED, height=0.8)
    axis.barh(blocks, counts, left=[-count / 2 for count in counts], color=BAR, height=0.8)
    for block, count in zip(blocks, counts, strict=True):
        inside = count > 0.12 * tokens
        place = 0 if inside else count / 2 + 0.015 * tokens
        axis.text(
            place, block, str(count), color="white" if inside else INK, fontsize=8,
            ha="center" if inside else "left", va="center_baseline",
        )  # fmt: skip
    axis.set_yticks(_ticks(len(counts)))
    axis.set_xticks([])
    axis.set_ylabel("block", color=INK)
    axis.set_xlabel(f"tokens computed, of {tokens}", color=INK)
    axis.tick_params(length=0, colors=SOFT)
    axis.margins(x=0.01, y=0.01)
    axis.spines[:].set_visible(False)


def _lives(axis: Axes, masks: Masks) -> None:
    from matplotlib import colormaps

    depth = masks.keep[:, masks.prefix :].sum(0).view(masks.grid).numpy()
    drawn = axis.imshow(
        depth, cmap=colormaps["Blues"].resampled(masks.depth + 1), vmin=-0.5, vmax=masks.depth + 0.5
    )
    axis.set_xticks(numpy.arange(-0.5, masks.grid[1]), minor=True)
    axis.set_yticks(numpy.arange(-0.5, masks.grid[0]), minor=True)
    axis.grid(which="minor", color="white", linewidth=1)
    axis.tick_params(which="both", length=0)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.set_xlabel("deepest block that computes the patch", color=INK)
    ticks = _ticks(masks.depth)
    side = axis.inset_axes((1.04, 0, 0.05, 1))
    bar = axis.figure.colorbar(drawn, cax=side, ticks=[0, *ticks])
    bar.set_ticklabels(["none", *map(str, ticks)])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=SOFT)


def _ticks(depth: int) -> list[int]:
    """Block numbers to print: all of a shallow model, some of a deep one, first and last always."""
    step = math.ceil(depth / 16)
    return sorted({1, *range(step, depth, step), depth} - ({depth - 1} if step > 1 else set()))


def _squares(grid: tuple[int, int]) -> numpy.ndarray:
    """A plain canvas: one square a patch, with a white rim."""
    cell = max(4, SIDE // max(grid))
    canvas = numpy.full((grid[0] * cell, grid[1] * cell, 3), 255, numpy.uint8)
    inner = (numpy.arange(cell) > 0) & (numpy.arange(cell) < cell - 1)
    squares = numpy.tile(inner, grid[0])[:, None] & numpy.tile(inner, grid[1])
    canvas[squares] = (31, 119, 180)
    return canvas


def fit(image: object, grid: tuple[int, int]) -> numpy.ndarray:
    """The image's middle in the shape of the patch grid: uint8 [grid[0] * c, grid[1] * c, 3].

    Plain squares where there is no image.
    """
    if image is None:
        return _squares(grid)
    picture = _picture(image)
    cell = max(4, SIDE // max(grid))
    height, width = grid[0] * cell, grid[1] * cell
    scale = min(picture.width / width, picture.height / height)
    left, top = (picture.width - width * scale) / 2, (picture.height - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    return numpy.asarray(picture.resize((width, height), Image.Resampling.LANCZOS, box))


def _picture(image: object) -> Image.Image:
    if isinstance(image, Image.Image):
        return convert(image)
    array = (
        image.detach().float().cpu().numpy()
        if isinstance(image, torch.Tensor)
        else numpy.asarray(image)
    )
    whole = numpy.issubdtype(array.dtype, numpy.integer) or (
        isinstance(image, torch.Tensor) and not image.is_floating_point()
    )
    if array.ndim == 3 and array.shape[2] not in (1, 3) and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        shape = list(array.shape)
        raise DataError(
            f"image must be a PIL image, [H, W, 3] or [3, H, W], got {type(image).__name__} {shape}"
        )
    if not numpy.isfinite(array).all():
        raise DataError("image must be finite, got NaN or infinity")
    if not whole:
        if array.min() < 0 or array.max() > 1:
            array = (array - array.min()) / max(array.max() - array.min(), 1e-12)
        array = array * 255
    return Image.fromarray(
        numpy.broadcast_to(
            array.round().clip(0, 255).astype(numpy.uint8), (*array.shape[:2], 3)
        ).copy()
    )


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SlimvitError(f"pictures need matplotlib (pip install matplotlib): {error}") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
