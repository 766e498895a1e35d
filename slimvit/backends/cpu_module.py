"""The compiled module for CPUs: how its functions are called, and how tensors are handed to it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from slimvit import _extensions
from slimvit.backends.forks import guard_forks
from slimvit.checks import dtype_name
from slimvit.errors import SlimvitError

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_ALIGNMENT = 64
_copies = WeakTensorKeyDictionary()  # by packs that lie elsewhere
_held = threading.local()  # what this thread may compute from, whatever others copy meanwhile
_copying = threading.Lock()
# A process that is forked while another thread copies would find the lock held, for ever.
os.register_at_fork(
    before=_copying.acquire, after_in_parent=_copying.release, after_in_child=_copying.release
)


def module() -> ModuleType:
    """slimvit._cpu; raises SlimvitError, with the reason, where it cannot be imported."""
    loaded = _extensions.load("_cpu")
    if loaded is None:
        raise SlimvitError(f"back end cpu: {_extensions.why_not('_cpu')}")
    guard_forks()
    return loaded


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of the module returns.

    Raises:
        SlimvitError: what it refuses, and what it finds no memory for.
    """
    try:
        return function(*arguments)
    except ValueError as error:
        raise SlimvitError(f"back end cpu: {error}") from error
    except MemoryError as error:
        raise SlimvitError(
            "back end cpu: there is no memory for the workspace of so many tokens on "
            f"{threads()} threads: fewer of either take less (torch.set_num_threads)"
        ) from error


def make_pack(
    function: Callable[..., int],
    options: dict[str, Any],
    arrays: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> Tensor:
    """The bytes, uint8, that a packing function of the module makes of weights for `dtype`."""
    plain = [None if array is None else _plain(array) for array in arrays]

    def fill(out: int) -> int:
        weights = [address(array) for array in plain]
        return function(**options, weights=weights, dtype=DTYPES[dtype], out=out)

    pack = torch.empty(call(fill, 0), dtype=torch.uint8, device="cpu")
    call(fill, address(pack))
    return pack


def _plain(array: Tensor) -> Tensor:
    array = array.detach()
    return (array.float() if array.is_floating_point() else array).contiguous()


def threads() -> int:
    """On how many threads to compute: torch's."""
    return torch.get_num_threads()


def address(tensor: Tensor | None) -> int:
    """Where a tensor's numbers start; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def pack_bytes(name: str, pack: Tensor) -> tuple[int, int]:
    """Where a pack starts and how long it is: C++ reads it without knowing any more of it."""
    fits = pack.dtype == torch.uint8 and pack.dim() == 1 and pack.is_contiguous() and on_cpu(pack)
    require(fits, f"{name} must be one-dimensional, uint8, contiguous", pack)
    pack = _aligned(pack)
    return pack.data_ptr(), pack.numel()


def _aligned(pack: Tensor) -> Tensor:
    """The same bytes where kernels can read them; a copy lives as long as the pack does.

    What torch.export.load reads lies where it lay in the file.
    """
    if pack.data_ptr() % _ALIGNMENT == 0:
        return pack
    state = (pack.data_ptr(), None if pack.is_inference() else pack._version)
    with _copying:  # a second copy would free the first, from which another thread may compute
        copy = _copies.get(pack)
        if copy is None or copy[0] != state:
            copy = _copies[pack] = (state, pack.clone())
    if not hasattr(_held, "copies"):
        _held.copies = WeakTensorKeyDictionary()
    _held.copies[pack] = copy
    return copy[1]


def on_cpu(tensor: Tensor) -> bool:
    """Whether C++ can read it."""
    return tensor.is_cpu


def require(holds: bool, rule: str, got: Tensor | int) -> None:
    """Refuse what breaks a rule."""
    if holds:
        return
    if isinstance(got, Tensor):
        rule = f"{rule}, on the CPU"
        got = f"{list(got.shape)}, {dtype_name(got.dtype)}, on {got.device}"
    raise SlimvitError(f"back end cpu: {rule}, got {got}")
