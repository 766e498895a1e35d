"""The calibration images' features at every block, computed once, in bounded memory."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Hashable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from slimvit import models
from slimvit.checks import iterable, whole
from slimvit.digests import content
from slimvit.errors import DataError, SlimvitError, UsageError
from slimvit.ops import slim_block
from slimvit.runtime.accelerated import check_floating
from slimvit.search.reduce import all_max, all_sum


class TensorStore:
    """Tensors by key: in memory up to a bound, in a temporary folder beyond it.

    Args:
        limit: bytes held in memory.
        directory: where the temporary folder is made; None for the system's.

    Raises:
        UsageError: the limit is no size, or no folder can be made there.
    """

    def __init__(self, limit: int, directory: str | None = None) -> None:
        self._free = whole("cache_bytes", limit, 0)
        self._memory: dict[Hashable, Tensor] = {}
        self._files: dict[Hashable, tuple[Path, torch.Size, torch.dtype]] = {}
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="slimvit-", dir=directory)
        except (OSError, TypeError) as error:
            rule = "cache_dir must be a folder that can be written to"
            raise UsageError(f"{rule}, got {directory!r}: {error}") from error

    def put(self, key: Hashable, value: Tensor) -> None:
        """Store a copy of `value` under `key`; what stood there is replaced."""
        value = value.detach().cpu().contiguous()
        old = self._memory.pop(key, None)
        if old is not None:
            self._free += old.nbytes
        if value.nbytes <= self._free:
            self._free -= value.nbytes
            self._memory[key] = value.clone()
            return
        number = len(self._files)
        path = (
            self._files[key][0] if key in self._files else Path(self._folder.name, f"{number}.bin")
        )
        try:
            value.view(-1).view(torch.uint8).numpy().tofile(path)
        except OSError as error:
            raise SlimvitError(
                f"features do not fit into {self._folder.name}: {error}; choose another cache_dir "
                "or a larger cache_bytes"
            ) from error
        self._files[key] = (path, value.shape, value.dtype)

    def get(self, key: Hashable) -> Tensor:
        """The tensor under `key`, on the CPU; not to be written to."""
        if key in self._memory:
            return self._memory[key]
        path, shape, dtype = self._files[key]
        return torch.from_numpy(np.fromfile(path, np.uint8)).view(dtype).view(shape)

    def close(self) -> None:
        """Forget everything and remove the temporary folder."""
        self._memory.clear()
        self._files.clear()
        self._folder.cleanup()


class Features:
    """Z_0 … Z_L of the dense model on this process's calibration batches.

    Attributes:
        batches: number of batches of this process.
        images: number of images over all processes.
        batch_size: images of the largest batch of all processes.
        fingerprint: of the images, the same however they are spread over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        cache_bytes: int,
        directory: str | None = None,
        progress: bool = True,
    ) -> None:
        self._device = next(model.parameters()).device
        self._dtype = next(model.parameters()).dtype
        self._store = TensorStore(cache_bytes, directory)
        self.batches = 0
        self._sizes: list[int] = []
        digest, count = 0, 0
        try:
            for images in tqdm(images_of(loader), desc="features", disable=not progress):
                digest += sum(_hash(image) for image in images)
                count += len(images)
                self._add(model, images)
        except BaseException:
            self.close()
            raise
        totals = all_sum(torch.tensor([count, digest % 2**62], dtype=torch.int64))
        self.images, self.batch_size = int(totals[0]), all_max(max(self._sizes, default=0))
        if self.images == 0:
            raise DataError("no calibration images: the loader yields nothing")
        self.fingerprint = f"{self.images} images, {int(totals[1]) % 2**62:016x}"

    @torch.no_grad()
    def _add(self, model: nn.Module, images: Tensor) -> None:
        x = models.embed(model, images.to(self._device, self._dtype)).transpose(0, 1).contiguous()
        self._sizes.append(x.shape[1])
        self._keep(0, x)
        for layer, block in enumerate(models.block_parts(model), start=1):
            x = slim_block(x, block, x.shape[0])
            self._keep(layer, x)
        self.batches += 1

    def _keep(self, layer: int, x: Tensor) -> None:
        if not torch.isfinite(x).all():
            where = "the embedding" if layer == 0 else f"block {layer}"
            raise SlimvitError(
                f"features must be finite: {where} gives NaN or infinity on calibration batch "
                f"{self.batches + 1}"
            )
        self._store.put((layer, self.batches), x)

    def at(self, layer: int, batch: int) -> Tensor:
        """Z_layer of a batch, token-first: [N, b, D], on the model's device."""
        return self._store.get((layer, batch)).to(self._device)

    def size(self, batch: int) -> int:
        """Images of a batch."""
        return self._sizes[batch]

    def set_moment(self, batch: int, moment: Tensor) -> None:
        """Keep C_t of a batch, [b, N, N]."""
        self._store.put(("moment", batch), moment)

    def moment(self, batch: int) -> Tensor:
        """C_t of a batch, as last set."""
        return self._store.get(("moment", batch)).to(self._device)

    def close(self) -> None:
        """Free the memory and the disk."""
        self._store.close()


class Peeked:
    """A loader's images, once over, of which the first batch may be looked at beforehand."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._rest = images_of(loader)

    @cached_property
    def first(self) -> Tensor | None:
        """The first batch; None where there is none."""
        return next(self._rest, None)

    def __iter__(self) -> Iterator[Tensor]:
        if self.first is not None:
            yield self.first
        yield from self._rest


def images_of(loader: Iterable[Any]) -> Iterator[Tensor]:
    """The images [b, C, H, W] of batches, which are images or begin with them.

    Raises:
        UsageError: the loader cannot be gone through, or a batch is something else, as a dict is.
        SlimvitError: they are integers, which have not been normalised.
    """
    return _images_of(iterable("loader", loader))


def _images_of(loader: Iterable[Any]) -> Iterator[Tensor]:
    for batch in loader:
        images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(images, Tensor):
            got = type(batch).__name__
            if images is not batch:
                got += f" that begins with {type(images).__name__}"
            raise UsageError(
                f"batches must be images [b, C, H, W] or tuples that begin with them, got {got}"
            )
        check_floating(images)
        yield images


def _hash(image: Tensor) -> int:
    return int.from_bytes(hashlib.blake2b(content(image), digest_size=7).digest(), "little")
