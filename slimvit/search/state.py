"""The search's state on disk, so that a killed search goes on where it stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from slimvit.errors import SlimvitError
from slimvit.files import atomic_write, refuse_unwritable, remove_leftovers, tensor_bytes
from slimvit.search.algorithm1 import Found
from slimvit.search.reduce import rank

_FORMAT = "slimvit-search"


class State:
    """Blocks found so far, for every pass of a search, in one safetensors file.

    A search makes one pass, or several where a budget is met by trying tolerances. Rank 0 writes
    after every block but L; the file is replaced as a whole, so a kill leaves the last finished
    block.

    Args:
        path: of the file; None keeps nothing.
        identity: settings and model by name, as text; a file of another search is refused.
        restart: ignore and replace what stands at `path`.

    Raises:
        UsageError: no file can be written there.
        SlimvitError: the file belongs to another search or cannot be read.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, identity: dict[str, str], restart: bool = False
    ) -> None:
        self._path = None if path is None else Path(path)
        self._identity: dict[str, str] = {}
        self._theirs: dict[str, str] | None = None
        self._passes: dict[str, list[Found]] = {}
        self.notes: dict[str, float] = {}
        if self._path is not None:
            refuse_unwritable("state", self._path)
            if rank() == 0:
                remove_leftovers(self._path)
        if self._path is not None and self._path.exists() and not restart:
            self._read()
        self.check(identity)

    def check(self, identity: dict[str, str]) -> None:
        """Learn more of what makes this search, and refuse the file of another.

        Raises:
            SlimvitError: the file belongs to another search.
        """
        self._identity |= identity
        for key, value in identity.items():
            if self._theirs is not None and self._theirs.get(key) != value:
                raise SlimvitError(
                    f"{self._path} belongs to another search: its {key} is "
                    f"{self._theirs.get(key)}, here it is {value}; delete it or restart"
                )

    def done(self, name: str) -> list[Found]:
        """Blocks of a pass that are found, L first."""
        return self._passes.get(name, [])

    def add(self, name: str, found: Found) -> None:
        """Record one more block of a pass."""
        self._passes.setdefault(name, []).append(found)
        self.write()

    def note(self, name: str, value: float) -> None:
        """Record a measured value, so that a resumed search decides alike."""
        self.notes[name] = value
        self.write()

    def write(self) -> None:
        """Put everything on disk, once there is more than block L, which is known without a search.

        So a search whose score fails at once leaves nothing behind that refuses the corrected one.
        """
        worth = self.notes or any(len(blocks) > 1 for blocks in self._passes.values())
        if self._path is None or rank() != 0 or not worth:
            return
        tensors, records = {}, {}
        for name, blocks in self._passes.items():
            records[name] = [
                {"layer": f.layer, "error": f.error, "steps": f.steps, "seconds": f.seconds}
                for f in blocks
            ]
            for f in blocks:
                key = f"{name}/{f.layer}"
                tensors[f"{key}/keep"], tensors[f"{key}/scores"] = f.keep, f.scores
                for part, value in f.weights.items():
                    tensors[f"{key}/weights/{part}"] = value.detach().cpu().contiguous()
        metadata = {
            "format": _FORMAT,
            "identity": json.dumps(self._identity),
            "passes": json.dumps(records),
            "notes": json.dumps(self.notes),
        }
        atomic_write(self._path, tensor_bytes(tensors, metadata))

    def remove(self) -> None:
        """The search has ended, or cannot end: the file is not needed any more."""
        if self._path is not None and rank() == 0:
            self._path.unlink(missing_ok=True)

    def _read(self) -> None:
        try:
            with safe_open(self._path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self._theirs = json.loads(metadata["identity"])
            records = json.loads(metadata["passes"])
            self.notes = json.loads(metadata["notes"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise SlimvitError(
                f"{self._path} is not a readable search state: delete it or restart ({error})"
            ) from error
        for name, blocks in records.items():
            self._passes[name] = [_found(name, record, tensors) for record in blocks]


def _found(name: str, record: dict, tensors: dict[str, torch.Tensor]) -> Found:
    key = f"{name}/{record['layer']}"
    start = f"{key}/weights/"
    weights = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
    return Found(
        layer=record["layer"],
        keep=tensors[f"{key}/keep"],
        scores=tensors[f"{key}/scores"],
        error=record["error"],
        steps=record["steps"],
        seconds=record["seconds"],
        weights=weights,
    )
