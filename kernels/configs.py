"""Tile sizes: one table, `configs.json`, keyed by kernel, architecture, width and lengths.

`benchmarks/tune.py` measures on a GPU and rewrites it; nothing is searched when a model runs.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent / "configs.json"
# What each architecture is taken for: the same instructions, and no more shared memory.
FAMILIES = {80: 80, 86: 86, 87: 80, 89: 86, 90: 90, 100: 100, 103: 100, 110: 100, 120: 86, 121: 86}
# Bytes of shared memory that one program may use.
SHARED_MEMORY = {80: 166912, 86: 101376, 90: 232448, 100: 232448}


@dataclass(frozen=True)
class Config:
    """How a kernel is cut into programs.

    Attributes:
        block_m: rows of a tile: tokens, or queries.
        block_n: its columns: outputs, hidden channels, or keys.
        block_k: how much of the inner dimension is loaded at a time.
        warps: of 32 threads, of a program.
        stages: loads in flight.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    def with_columns(self, columns: int, part: int = 0) -> Config:
        """The same for so many columns, in tiles of whole parts, which end where the columns do."""
        limit = columns & -columns if part else max(16, 1 << (columns - 1).bit_length())
        return replace(self, block_n=max(part, min(self.block_n, limit)))


def family(arch: int) -> int:
    """The architecture of the table that a compute capability, such as 89, is taken for."""
    if arch in FAMILIES:
        return FAMILIES[arch]
    return 86 if arch > 120 else max(known for known in (80, 90, 100) if known <= max(arch, 80))


@functools.cache
def entries() -> list[dict[str, Any]]:
    """The table, the more special entries first; null stands for anything."""
    return json.loads(TABLE.read_text())


def find(kernel: str, arch: int, itemsize: int, width: int, rows: int) -> dict[str, Any]:
    """The entry of the table that `lookup` reads; it takes the same arguments."""
    wanted = family(arch)
    for entry in entries():
        if (
            kernel in entry["kernel"]
            and entry["arch"] in (None, wanted)
            and entry["itemsize"] in (None, itemsize)
            and (entry["width"] is None or width <= entry["width"])
            and (entry["rows"] is None or rows <= entry["rows"])
        ):
            return entry
    raise LookupError(f"{TABLE.name} has no entry for {kernel}, sm_{wanted}, width {width}")


@functools.lru_cache(maxsize=4096)
def lookup(kernel: str, arch: int, itemsize: int, width: int, rows: int) -> Config:
    """The configuration of a kernel: the first entry that is not for something else.

    Args:
        kernel: name of a kernel or of a stage of a block.
        arch: compute capability, such as 90.
        itemsize: bytes of a value, 2 or 4.
        width: D, or the inner dimension of a product.
        rows: tokens in the batch, or kept tokens of an image.

    Raises:
        LookupError: the table has nothing for it.
    """
    return Config(*find(kernel, arch, itemsize, width, rows)["config"])
