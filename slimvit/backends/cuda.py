"""The CUDA C++ kernels: what they need of a device, and how they are called."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from slimvit import _extensions
from slimvit.checks import dtype_name
from slimvit.errors import SlimvitError

OLDEST = 70
_BFLOAT16 = 80
_OLDEST_OF_CUDA_13 = 75
MOST_IMAGES = 65535  # of the grids that have a row for each
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


def why_not(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute in `dtype` on a device, or None if they can."""
    reason = _extensions.why_not("_cuda")
    if reason is not None:
        return reason
    device, built = torch.device(device), module()
    emulated = getattr(built, "emulated", False)
    if device.type != ("cpu" if emulated else "cuda"):
        return f"it computes on CUDA GPUs, not on {device.type}"
    reason = built.why_not()
    if reason is not None:
        return reason
    capability = built.capability() if emulated else _capability(device)
    if capability < OLDEST:
        return f"it has tensor-core kernels for sm_{OLDEST} and newer, this is sm_{capability}"
    if dtype not in DTYPES:
        return wrong(dtype)
    if dtype == torch.bfloat16 and capability < _BFLOAT16:
        return f"bfloat16 needs sm_{_BFLOAT16}, this is sm_{capability}: use float16"
    return (
        None
        if emulated
        else _runs_on(torch.cuda.current_device() if device.index is None else device.index)
    )


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


_RUN_ON: set[int] = set()


def _runs_on(index: int) -> str | None:
    """Why kernels of this build do not run on a GPU, and the cure where its code was left out.

    Where they do they are tried once; a GPU without memory to spare may have some the next time.
    """
    if index in _RUN_ON:
        return None
    built, capability = module(), _capability(torch.device("cuda", index))
    reason = built.probe(index)
    if reason is None:
        _RUN_ON.add(index)
    if reason is None or "NoKernelImage" not in reason:
        return reason
    cure = f"TORCH_CUDA_ARCH_LIST={capability // 10}.{capability % 10}"
    if capability < _OLDEST_OF_CUDA_13:
        cure = "CUDA 12 (CUDACXX=/path/of/12/bin/nvcc), for compilers of CUDA 13 leave it out"
    code = f"code for sm_{capability} ({built.architectures()})"
    return f"it was built without {code}: build slimvit with {cure}"


def wrong(dtype: torch.dtype) -> str:
    """The reason why the kernels do not compute in `dtype`."""
    name = dtype_name(dtype)
    return f"it computes float16 and bfloat16, not {name}: use back end triton or torch"


def module() -> ModuleType:
    """`slimvit._cuda`."""
    module = _extensions.load("_cuda")
    if module is None:
        raise SlimvitError(f"back end cuda: {_extensions.why_not('_cuda')}")
    return module


def eights(**sizes: int) -> None:
    """Refuse sizes that are not multiples of 8: kernels read rows 16 bytes at a time."""
    for name, size in sizes.items():
        if size % 8:
            raise SlimvitError(f"back end cuda: {name} must be a multiple of 8, got {size}")


def at_most(name: str, size: int, most: int) -> None:
    """Refuse a size that is more than a kernel has room for."""
    if size > most:
        raise SlimvitError(f"back end cuda: {name} must be at most {most}, got {size}")


def part_width(width: int) -> int:
    """How many of a row's columns have statistics of their own."""
    return min(64, width & -width)


def per_image(tensor: Tensor | None) -> int:
    """Elements from one image's to the next, 0 where all images share them."""
    return tensor.shape[1] if tensor is not None and tensor.dim() == 2 else 0


def _address(name: str, tensor: Tensor) -> int:
    """Where a tensor begins; rows of two-byte numbers are read 16 bytes at a time."""
    address = tensor.data_ptr()
    if address % 16 and tensor.element_size() == 2:
        rule = f"{name} must begin at a multiple of 16 bytes"
        raise SlimvitError(f"back end cuda: {rule}, got one {address % 16} beyond: clone it")
    return address


def call(function: object, like: Tensor, **arguments: object) -> None:
    """`run` a kernel of matrices in the dtype of `like`."""
    if like.dtype not in DTYPES:
        raise SlimvitError(f"back end cuda: {wrong(like.dtype)}")
    run(function, like, dtype=DTYPES[like.dtype], **arguments)


def run(function: object, like: Tensor, **arguments: object) -> None:
    """Call a kernel with tensors as addresses, on the current stream of the device of `like`."""
    at_most("batch", arguments.get("batch", 0), MOST_IMAGES)
    plain = {
        name: _address(name, value) if isinstance(value, Tensor) else 0 if value is None else value
        for name, value in arguments.items()
    }
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    try:
        function(**plain, stream=stream)
    except (RuntimeError, ValueError) as error:
        raise SlimvitError(f"back end cuda: {error}") from error
