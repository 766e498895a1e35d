"""What fused GPU kernels ask of their input, and which set of them a back end has.

A set of kernels is a module with the functions of `slimvit.kernels`: the Triton back end's is that
package itself, the CUDA back end's is `slimvit.backends.cuda_kernels`.
"""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slimvit.backends import cuda, cuda_kernels, triton
from slimvit.backends.cuda import part_width  # as many parts in every set of kernels
from slimvit.checks import dtype_name
from slimvit.errors import SlimvitError

if TYPE_CHECKING:
    from slimvit.backends.fused_weights import BlockWeights

_WHY_NOT = {"triton": triton.why_not, "cuda": cuda.why_not}
_KERNELS = {"triton": triton.kernel_set, "cuda": lambda: cuda_kernels}


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
    """Refuse what a block's kernels cannot read; `ops.FusedBlock` says what each is.

    What an index holds is not looked at: on a GPU that would wait for it.
    """
    _known(backend)
    width, dtype, device = part.qkv.shape[1], part.qkv.dtype, part.qkv.device
    reason = _ask(backend, device, dtype)
    if reason is not None:
        raise SlimvitError(f"back end {backend}: {reason}")
    rule = f"x must be [B, m, D] with D = {width}, {dtype_name(dtype)}, on {device}"
    fits = x.dim() == 3 and x.shape[2] == width and x.dtype == dtype and x.device == device
    require(backend, fits, rule, x)
    batch, m, _ = x.shape
    check_images(backend, batch)
    require(backend, m > 0, "x must have tokens", x)
    require(backend, 1 <= n <= m, f"n must be in [1, m] = [1, {m}]", n)
    check_stats(backend, stats, x)
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


def check_stats(backend: str, stats: Tensor | None, x: Tensor) -> None:
    """Refuse what are no statistics of the rows of x [B, m, D]."""
    if stats is None:
        return
    shape = (*x.shape[:2], x.shape[2] // part_width(x.shape[2]), 2)
    rule = "stats must be [B, m, parts, 2] ="
    require_tensor(backend, rule, stats, shape, torch.float32, x.device)


def check_activation(backend: str, activation: str) -> None:
    """Refuse the name of none that kernels have."""
    known = kernel_set(backend).ACTIVATIONS
    rule = f"activation must be one of {', '.join(known)}"
    require(backend, activation in known, rule, activation)


def check_eps(backend: str, eps: list[float]) -> None:
    """Refuse what is not one for each of a block's norms."""
    require(backend, len(eps) == 2, "eps must be those of two norms", len(eps))


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
        got = f"{list(got.shape)}, {dtype_name(got.dtype)}, on {got.device}"
    raise SlimvitError(f"back end {backend}: {rule}, got {got}")


def require_tensor(
    backend: str,
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise unless a tensor is what a kernel reads it for; `name` may end in what its shape is."""
    fits = tensor.shape == shape and tensor.dtype == dtype and tensor.device == device
    if not (fits and tensor.is_contiguous()):
        name = name if name.endswith("=") else f"{name} must be"
        rule = f"{name} {list(shape)}, {dtype_name(dtype)}, contiguous, on {device}"
        require(backend, False, rule, tensor)
