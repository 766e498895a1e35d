"""What fused GPU kernels ask of their input, and which set of them a back end has.

A set of kernels is a module with the functions of `slimvit.kernels`: the Triton back end's is that
package itself, the CUDA back end's is `slimvit.backends.cuda_kernels`.
"""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from slimvit.backends import cuda, cuda_kernels, triton
from slimvit.backends.cuda import part_width  # as many parts in every set of kernels
from slimvit.errors import SlimvitError

_WHY_NOT = {"triton": triton.why_not, "cuda": cuda.why_not}
_KERNELS = {"triton": triton.kernel_set, "cuda": lambda: cuda_kernels}


class BlockWeights(NamedTuple):
    """The tensors of one block, in the order in which an op takes them.

    Norms are folded: weights times the norm's weight, biases plus the weight times the norm's bias.
    Matrices have the dtype that the block computes in, everything else is float32.

    Attributes:
        qkv: [3·H·d, D].
        qkv_bias: [3·H·d].
        qkv_sums: sums of the rows of `qkv`, as rounded.
        proj: [D, H·d].
        proj_bias: [D].
        fc1: [hidden, D].
        fc1_bias: [hidden].
        fc1_sums: sums of the rows of `fc1`, as rounded.
        fc2: [D, hidden].
        fc2_bias: [D].
        keys: for a block that keeps one or two tokens, the key projection of each head turned over,
            [H·D, d]; else an empty tensor.
        fc1_squares: sums of the squares of the rows of `fc1`, as rounded, [hidden].
    """

    qkv: Tensor
    qkv_bias: Tensor
    qkv_sums: Tensor
    proj: Tensor
    proj_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc1_sums: Tensor
    fc2: Tensor
    fc2_bias: Tensor
    keys: Tensor
    fc1_squares: Tensor


def check(
    backend: str,
    x: Tensor,
    stats: Tensor | None,
    part: BlockWeights,
    n: int,
    index: Tensor | None,
    key_bias: Tensor | None,
    spread: Tensor | None = None,
) -> None:
    """Refuse what a block's kernels cannot read; `ops.FusedBlock` says what each is."""
    _known(backend)
    width, dtype, device = part.qkv.shape[1], part.qkv.dtype, part.qkv.device
    reason = _ask(backend, device, dtype)
    if reason is not None:
        raise SlimvitError(f"back end {backend}: {reason}")
    rule = f"x must be [B, m, D] with D = {width}, {_name(dtype)}, on {device}"
    fits = x.dim() == 3 and x.shape[2] == width and x.dtype == dtype and x.device == device
    require(backend, fits, rule, x)
    batch, m, _ = x.shape
    check_images(backend, batch)
    require(backend, m > 0, "x must have tokens", x)
    require(backend, 1 <= n <= m, f"n must be in [1, m] = [1, {m}]", n)
    if stats is not None:
        shape = (batch, m, width // part_width(width), 2)
        fits = stats.shape == shape and stats.dtype == torch.float32 and stats.device == device
        rule = f"stats must be [B, m, parts, 2] = {list(shape)}, float32, contiguous, on {device}"
        require(backend, fits and stats.is_contiguous(), rule, stats)
    if index is not None:
        fits = index.shape == (batch, n) and index.dtype == torch.int64
        rule = f"index must be [B, n] = [{batch}, {n}], int64, on {device}"
        require(backend, fits and index.device == device, rule, index)
    if key_bias is not None:
        fits = key_bias.shape in ((m,), (batch, m)) and key_bias.is_floating_point()
        rule = f"key_bias must be [m] = [{m}] or [B, m] = [{batch}, {m}], floating point"
        require(backend, fits and key_bias.device == device, f"{rule}, on {device}", key_bias)
    if spread is not None:
        fits = spread.shape == (batch, m) and spread.dtype == torch.float32
        rule = f"spread must be [B, m] = [{batch}, {m}], float32, on {device}"
        require(backend, fits and spread.device == device, rule, spread)


def check_images(backend: str, batch: int) -> None:
    """Refuse batches that have more images than a grid has rows."""
    most = cuda.MOST_IMAGES
    require(backend, batch <= most, f"a batch must have at most {most} images", batch)


def kernel_set(backend: str) -> ModuleType:
    """The functions of a back end's kernels, by the names that `slimvit.kernels` gives them."""
    _known(backend)
    return _KERNELS[backend]()


def _known(backend: str) -> None:
    if backend not in _KERNELS:
        raise SlimvitError(f"back end must be one of {', '.join(_KERNELS)}, got {backend!r}")


_WORKS: set[tuple[str, torch.device, torch.dtype]] = set()


def _ask(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why not; of a GPU that works only once, since it stays what it is."""
    asked = (backend, device, dtype)
    if asked in _WORKS:
        return None
    reason = _WHY_NOT[backend](device, dtype)
    if reason is None and device.type == "cuda":
        _WORKS.add(asked)
    return reason


def nothing(like: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """What an empty batch gives: no kernel is launched for it."""
    stats = like.new_empty(0, rows, width // part_width(width), 2, dtype=torch.float32)
    return like.new_empty(0, rows, width), stats


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be where the tensors are."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def tf32_allowed() -> bool:
    """Whether float32 products may be in TF32, by whichever of torch's switches was used."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # it does not answer once `fp32_precision` was set
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def precision_of(tf32: bool) -> str:
    """What kernels call the precision of float32 products."""
    return "tf32" if tf32 else "ieee"


def require(backend: str, holds: bool, rule: str, got: Tensor | int | str) -> None:
    """Raise what the rule is and what came instead, unless it holds."""
    if holds:
        return
    if isinstance(got, Tensor):
        got = f"{list(got.shape)}, {_name(got.dtype)}, on {got.device}"
    raise SlimvitError(f"back end {backend}: {rule}, got {got}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
