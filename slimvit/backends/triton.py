"""The Triton kernels: what they need of a device."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from slimvit import _extensions
from slimvit.errors import SlimvitError

OLDEST = 80
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_STARTED: list[bool] = []


def why_not(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute in `dtype` on a device, or None if they can."""
    reason = _extensions.why_not("kernels")
    if reason is not None:
        return reason
    device = torch.device(device)
    if device.type == "cpu" and kernel_set().INTERPRETED:
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly: use float32 or float16 in it"
    elif device.type != "cuda":
        return f"it computes on CUDA GPUs, not on {device.type}"
    elif not torch.cuda.is_available():
        return "no CUDA GPU is available to torch"
    elif torch.version.hip is not None:
        return "its tiles are made for NVIDIA GPUs, this is AMD's"
    else:
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor < OLDEST:
            return (
                f"Triton has no matrix instructions below sm_{OLDEST}, and "
                f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}"
            )
        reason = None if kernel_set().INTERPRETED else _starts()
        if reason is not None:
            return reason
    if dtype not in DTYPES:
        return (
            f"{str(dtype).removeprefix('torch.')} is not computed: use float16, bfloat16 or float32"
        )
    return None


def _starts() -> str | None:
    """Why Triton does not start, or None: at first it compiles its driver with a C compiler."""
    if not _STARTED:
        try:
            importlib.import_module("triton.runtime").driver.active.get_current_device()
        except Exception as error:  # of the compiler, the linker or CUDA
            text = str(error).strip() or type(error).__name__
            return f"Triton does not start: {text.splitlines()[0]}"
        _STARTED.append(True)
    return None


def kernel_set() -> ModuleType:
    """`slimvit.kernels`."""
    module = _extensions.load("kernels")
    if module is None:
        raise SlimvitError(f"back end triton: {_extensions.why_not('kernels')}")
    return module
