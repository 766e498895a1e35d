"""Short digests that tell whether a stopped run goes on with what it was begun with."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def code_digest(*things: object) -> str:
    """A digest of the files where functions and classes are defined; "" where there is no source.

    A file counts as a whole, for what it defines may lean on its constants and its helpers.
    slimvit's own things and those that are in no file, as a notebook's, count by themselves.
    """
    sources = [_source(thing) for thing in things]
    if not any(sources):
        return ""
    return hashlib.blake2b(b"\0".join(sources), digest_size=8).hexdigest()


def content(value: Tensor) -> memoryview:
    """The numbers of a dense tensor in their order, as bytes, wherever and however it is held."""
    import torch

    plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.view(-1).view(torch.uint8).numpy().data


def is_own(thing: object) -> bool:
    """Whether slimvit itself defines a function or a class."""
    return str(getattr(thing, "__module__", "")).partition(".")[0] == "slimvit"


def _source(thing: object) -> bytes:
    thing = inspect.unwrap(thing)  # a decorator's wrapper is in the decorator's file
    with contextlib.suppress(OSError, TypeError):
        file = inspect.getsourcefile(thing)
        if file is not None and os.path.isfile(file) and not is_own(thing):
            return Path(file).read_bytes()
        return inspect.getsource(thing).encode()
    if inspect.isclass(thing):  # a notebook's: nothing tells the cell, but that of its functions
        return b"\0".join(_source(f) for f in vars(thing).values() if inspect.isfunction(f))
    return b""
