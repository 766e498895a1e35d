"""Which configurations to try, which to take, and how the table then reads: no GPU here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any, NamedTuple

Config = tuple[int, int, int, int, int]  # block_m, block_n, block_k, warps, stages
Entry = dict[str, Any]
UNBOUNDED = 1 << 40
MARGIN = 0.03

_LARGE = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (128, 128, 64, 4, 4)]
_LARGE += [(128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 64, 64, 4, 3), (128, 64, 64, 4, 4)]
_LARGE += [(256, 64, 64, 8, 3), (64, 128, 64, 4, 4), (64, 256, 64, 4, 3), (64, 64, 64, 4, 4)]
_LARGE += [(128, 128, 32, 4, 4), (128, 128, 128, 8, 2)]
_SMALL = [(16, 32, 128, 4, 4), (16, 64, 128, 4, 4), (16, 128, 64, 4, 4), (32, 32, 64, 4, 5)]
_SMALL += [(32, 32, 128, 4, 4), (32, 64, 64, 4, 4), (32, 64, 128, 4, 4), (32, 128, 64, 4, 4)]
_SMALL += [(64, 32, 128, 4, 4), (64, 64, 64, 4, 4), (64, 64, 128, 4, 3), (32, 32, 128, 2, 4)]
_MIDDLE = [*_SMALL[4:], (64, 128, 64, 4, 4), (128, 64, 64, 4, 4), (128, 128, 64, 8, 3)]
_SINGLE = [(32, 32, 32, 4, 2), (32, 64, 32, 4, 2), (64, 32, 32, 4, 2), (64, 64, 16, 4, 2)]
_SINGLE += [(64, 64, 32, 8, 2), (32, 32, 16, 4, 3)]


class Key(NamedTuple):
    """What an entry of the table is for: `width` at most, and `rows` at most, None for any."""

    stage: str
    arch: int
    itemsize: int
    width: int
    rows: int | None


class Choice(NamedTuple):
    """What was found for a key: a configuration, and how much longer the one before takes."""

    config: Config
    before: Config
    gain: float


def candidates(key: Key, current: Config, shared_memory: int) -> list[Config]:
    """Configurations worth measuring, the present one first.

    Args:
        key: what they are for.
        current: what the table has.
        shared_memory: bytes that a program may use; tiles in flight that exceed it are left out.
    """
    if key.stage == "attention":
        tiles = [(32, 2), (32, 4), (64, 4), (64, 8), (128, 4), (128, 8)]
        tiles = [(16, 2), (16, 4)] if key.rows and key.rows <= 32 else tiles
        found = [(m, n, 0, w, s) for (m, w), n, s in product(tiles, (current[1],), (1, 2, 3))]
    elif key.stage == "last_attention":
        found = [(0, n, 0, w, s) for n, w, s in product((16, 32, 64, 128), (4, 8), (1, 2, 3))]
    elif key.stage == "mlp":
        tiles = [(16, 4), (32, 4), (64, 4), (64, 8), (128, 8)]
        found = [(m, n, 64, w, s) for (m, w), n, s in product(tiles, (32, 64), (2, 3))]
    elif key.itemsize > 2:
        found = _SINGLE
    else:
        small = key.rows is not None and key.rows <= 512
        found = _SMALL if small else _LARGE if key.rows is None else _MIDDLE
        if key.stage == "embedding" and not small:  # float32 images leave room for smaller ones
            found = [*_LARGE, *_MIDDLE]
    limit = 1 << (key.width - 1).bit_length()
    found = [c for c in found if c[2] <= max(limit, 16) and shared(key, c) <= shared_memory]
    return list(dict.fromkeys([current, *found]))


def shared(key: Key, config: Config) -> int:
    """Bytes that the tiles in flight of a product take; 0 for kernels that are not one product."""
    m, n, k, _, stages = config
    if key.stage == "embedding":  # images come in float32, too
        return (4 * m + key.itemsize * n) * k * stages
    return key.itemsize * (m + n) * k * stages if key.stage not in ("mlp", "attention") else 0


def choose(
    times: dict[Config, Sequence[float | None]],
    weights: Sequence[float],
    current: Config,
    margin: float = MARGIN,
) -> Choice:
    """The fastest configuration that works for every shape; the present one unless clearly beaten.

    Args:
        times: of each candidate, seconds of each shape, None where it does not compile, launch or
            answer right.
        weights: how often each shape occurs.
        current: the present configuration.
        margin: by which fraction of its time another must be faster.

    Returns:
        The choice; its gain is the geometric mean over shapes of old over new time, else 1.
    """
    right = {c: [float(t) for t in ts if t] for c, ts in times.items() if all(ts)}
    if not right:
        return Choice(current, current, 1.0)

    def score(config: Config) -> float:
        logs = (w * math.log(t) for w, t in zip(weights, right[config], strict=True))
        return math.exp(sum(logs) / sum(weights))

    best = min(right, key=score)
    if current not in right:
        return Choice(best, current, math.inf)
    gain = score(current) / score(best)
    return Choice(best, current, gain) if gain > 1 + margin else Choice(current, current, 1.0)


def buckets(entries: Iterable[Entry], stage: str, arch: int, itemsize: int) -> list[int | None]:
    """The bounds of rows that the table tells apart for a stage, None for any number last."""
    fits = [e for e in entries if stage in e["kernel"] and e["arch"] in (None, arch)]
    bounds = {e["rows"] for e in fits if e["itemsize"] in (None, itemsize)} - {None}
    bounds |= {128} if stage == "attention" else set()
    return [*sorted(bounds), None]


def bucket(bounds: Sequence[int | None], rows: int) -> int | None:
    """The bound that so many rows fall under."""
    return next(bound for bound in bounds if bound is None or rows <= bound)


def merged(entries: Sequence[Entry], found: dict[Key, Choice]) -> list[Entry]:
    """The table with what was found, the more special entries ahead of those that cover them.

    For a stage that has any change, all that was measured is written, so that no narrower model
    falls under the entry of a wider one. Other entries stay as they are, in their order.
    """
    result = [dict(entry) for entry in entries]
    changed = {key.stage for key, choice in found.items() if choice.config != choice.before}
    for key, choice in found.items():
        if key.stage not in changed:
            continue
        stage, arch, itemsize, width, rows = key
        entry = {"kernel": [stage], "arch": arch, "itemsize": itemsize}
        entry |= {"width": width, "rows": rows, "config": list(choice.config)}
        same = [i for i, old in enumerate(result) if {**old, "config": entry["config"]} == entry]
        if same:
            result[same[0]] = entry
        else:
            place = (i for i, old in enumerate(result) if covers(old, entry))
            result.insert(next(place, len(result)), entry)
    return result


def covers(old: Entry, new: Entry) -> bool:
    """Whether an entry would answer for all that another is for."""
    alike = set(new["kernel"]) <= set(old["kernel"])
    alike &= all(old[name] in (None, new[name]) for name in ("arch", "itemsize"))
    return alike and all(
        (old[name] or UNBOUNDED) >= (new[name] or UNBOUNDED) for name in ("width", "rows")
    )


def text_of(entries: Iterable[Entry]) -> str:
    """The table as its file has it: one entry a line."""
    return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in entries) + "\n]\n"
