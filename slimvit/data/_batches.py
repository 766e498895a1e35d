"""Batches of an image folder, the same whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from slimvit.checks import whole, wholes
from slimvit.data._folder import ImageFolder, Unreadable, warn
from slimvit.errors import DataError, UsageError


class Batches:
    """The batches of a loader; iterate as often as you like.

    Batch j holds the readable ones of images j·b … (j+1)·b − 1, and belongs to process j mod
    world, so that a batch is the same whatever the number of processes. With `shuffle_seed` the
    list is shuffled anew for each value of `epoch`, and every process gets equally many batches
    (the rest sit the epoch out).

    Yields (images [b, C, H, W] float32, targets [b] int64, -1 for no label). A batch without a
    readable image is left out; with `keep_empty` it comes with b = 0 and images of shape [0].
    """

    def __init__(
        self,
        dataset: ImageFolder,
        batch_size: int,
        workers: int = 0,
        shard: tuple[int, int] = (0, 1),
        *,
        shuffle_seed: int | None = None,
        keep_empty: bool = False,
    ) -> None:
        self.batch_size = whole("batch size", batch_size, 1)
        self.workers = whole("workers", workers, 0)
        self.dataset, self.shard = dataset, _shard(shard)
        self.shuffle_seed, self.keep_empty, self.epoch = shuffle_seed, keep_empty, 0

    def __len__(self) -> int:
        return len(self._indices())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        new = seen = 0
        for images, targets, unreadable in self._loader():
            new += sum(self.dataset.skip(item) for item in unreadable)
            seen += len(images)
            if len(images) or self.keep_empty:
                yield images, targets
        if new:
            skipped, total = len(self.dataset.skipped), len(self.dataset)
            warn(f"{skipped} of {total} images skipped as unreadable")
        if not seen and not self._any_readable():
            root, total = self.dataset.root, len(self.dataset)
            raise DataError(f"none of the {total} images in {root} can be read")

    def _indices(self) -> list[list[int]]:
        order, (rank, world) = list(range(len(self.dataset))), self.shard
        if self.shuffle_seed is not None:
            generator = torch.Generator().manual_seed(_seed(self.shuffle_seed, self.epoch))
            order = torch.randperm(len(order), generator=generator).tolist()
        step = self.batch_size
        batches = [order[i : i + step] for i in range(0, len(order), step)]
        if self.shuffle_seed is not None:
            batches = batches[: len(batches) // world * world]
        return batches[rank::world]

    def _loader(self) -> DataLoader:
        indices = self._indices()
        seed = _seed(self.shuffle_seed or 0, self.epoch) + self.shard[0] + 1
        return DataLoader(
            self.dataset,
            batch_sampler=indices,
            num_workers=min(self.workers, len(indices)),
            collate_fn=_collate,
            generator=torch.Generator().manual_seed(seed),  # seeds the workers' augmentation
        )

    def _any_readable(self) -> bool:
        return any(not isinstance(item, Unreadable) for item in _items(self.dataset))


def loader(
    dataset: ImageFolder,
    batch_size: int,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    *,
    shuffle_seed: int | None = None,
    keep_empty: bool = False,
) -> Batches:
    """Batches of (images [b, C, H, W] float32, targets [b] int64) of a folder; see `Batches`.

    Args:
        dataset: the images.
        batch_size: images a batch, at least 1.
        workers: processes that decode; 0 decodes in this one.
        shard: (rank, world): this process takes every world-th batch, from the rank-th on.
        shuffle_seed: shuffle, for training; None keeps the order.
        keep_empty: yield a batch even where no image of it can be read, so that processes stay
            in step; its images are of shape [0].

    Raises:
        UsageError: a batch size below 1, workers below 0, or a shard that is no (rank, world).
        DataError: while iterating, when no image at all can be read.
    """
    return Batches(
        dataset, batch_size, workers, shard, shuffle_seed=shuffle_seed, keep_empty=keep_empty
    )


def _shard(shard: tuple[int, int]) -> tuple[int, int]:
    found = wholes("shard", shard)
    if len(found) != 2 or not 0 <= found[0] < found[1]:
        raise UsageError(f"shard must be (rank, world), 0 <= rank < world, got {shard}")
    return found[0], found[1]


def _items(dataset: ImageFolder) -> Iterator[Any]:
    return (dataset[i] for i in range(len(dataset)))


def _seed(seed: int, epoch: int) -> int:
    return seed * 1_000_003 + epoch * 10_007


def _collate(items: Sequence[Any]) -> tuple[Tensor, Tensor, list[Unreadable]]:
    unreadable = [item for item in items if isinstance(item, Unreadable)]
    good = [item for item in items if not isinstance(item, Unreadable)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return images, torch.tensor([target for _, target in good], dtype=torch.int64), unreadable
