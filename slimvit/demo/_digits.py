"""scikit-learn's handwritten digits as small colour pictures, with a split that is held out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from slimvit.errors import DataError

CANVAS = 48  # side of a rendered picture, in pixels
DIGIT = 30.0  # side of the 8 x 8 source image on the canvas, in pixels
SPLIT_SEED, HELD_OUT = 2022, 0.25
HELD_OUT_SEED = 91
MEAN, STD = 0.5, 0.5


class Split(NamedTuple):
    """One part of the digits: grey source images [n, 8, 8] in [0, 1] and labels [n], int64."""

    images: Tensor
    labels: Tensor

    def first(self, count: int | None) -> Split:
        """The first `count` of them; all for None."""
        return Split(self.images[:count], self.labels[:count])


def load_splits() -> tuple[Split, Split]:
    """The training and the held-out split of the 1797 digits: stratified, always the same.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(
            f"the digits need scikit-learn (pip install scikit-learn): {error}"
        ) from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float() / 16  # [1797, 8, 8]
    labels = torch.from_numpy(bunch.target).long()
    train, held_out = train_test_split(
        range(len(labels)), test_size=HELD_OUT, random_state=SPLIT_SEED, stratify=bunch.target
    )
    return Split(images[train], labels[train]), Split(images[held_out], labels[held_out])


def render(
    images: Tensor, generator: torch.Generator, jitter: float = 3.0, turn: float = 12.0
) -> Tensor:
    """Light digits on dark, noisy, unevenly lit paper, near the middle of the picture.

    Args:
        images: source digits, [B, 8, 8], in [0, 1].
        generator: where place, size, angle, colours and noise come from.
        jitter: largest shift of the digit from the middle, in pixels.
        turn: largest rotation, in degrees.

    Returns:
        [B, 3, 48, 48], float32, (value - 0.5) / 0.5 of colours in [0, 1].
    """
    count = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    angle = uniform(-turn, turn) * (math.pi / 180)
    size = CANVAS / (DIGIT * uniform(0.9, 1.1))
    cos, sin = size * angle.cos(), size * angle.sin()
    shift = uniform(-jitter, jitter, 2) * (2 / CANVAS)
    matrix = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)  # [B, 2, 2]
    theta = torch.cat([matrix, -matrix @ shift[:, :, None]], 2)  # [B, 2, 3]
    grid = functional.affine_grid(theta, [count, 1, CANVAS, CANVAS], align_corners=False)
    ink = functional.grid_sample(images[:, None], grid, mode="bicubic", align_corners=False).clamp(
        0, 1
    )
    paper = uniform(0.05, 0.3, 3, 1, 1)
    slope = uniform(-0.08, 0.08, 2, 1, 1)
    ramp = torch.linspace(-1, 1, CANVAS)
    light = slope[:, :1] * ramp[:, None] + slope[:, 1:] * ramp  # [B, 1, 48, 48]
    noise = 0.03 * torch.randn(count, 3, CANVAS, CANVAS, generator=generator)
    colour = torch.lerp(paper, uniform(0.6, 1.0, 3, 1, 1), ink) + light + noise  # [B, 3, 48, 48]
    return (colour.clamp(0, 1) - MEAN) / STD


class Batches:
    """Batches of rendered digits: images [b, 3, 48, 48] and labels [b].

    Args:
        split: the source digits.
        batch_size: images a batch; the last one may be smaller.
        seed: of shuffling and rendering.
        training: shuffle, and render each pass differently; otherwise every pass is the same.
    """

    def __init__(
        self, split: Split, batch_size: int, *, seed: int = 0, training: bool = False
    ) -> None:
        self.split, self.batch_size, self.seed, self.training = split, batch_size, seed, training
        self.epoch = 0  # of a training set: the pass that comes next

    def __len__(self) -> int:
        return math.ceil(len(self.split.labels) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        self.epoch += self.training
        count = len(self.split.labels)
        order = torch.randperm(count, generator=generator) if self.training else torch.arange(count)
        for index in order.split(self.batch_size):
            yield render(self.split.images[index], generator), self.split.labels[index]


def held_out_batches(split: Split, batch_size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """The held-out images as everyone sees them: one fixed rendering, whatever the batch size.

    Args:
        split: the held-out split, or its first images.
        batch_size: images a batch.
    """
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    images = torch.cat([render(image[None], generator) for image in split.images])
    return list(zip(images.split(batch_size), split.labels.split(batch_size), strict=True))
