"""The CUDA kernels on a host without a GPU: the module that takes the place of slimvit._cuda.

The build lies in build/emulated. Kernels take CPU tensors there, in a device of one's choice, and
end with an error where threads race for shared memory: see tests/emulation.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import builds
import torch

from slimvit import _extensions

BUILD = builds.ROOT / "build" / "emulated"
why_not = builds.why_not


class Device(NamedTuple):
    """Compute capability such as 80, KiB of shared memory a block, and the dtype to compute in."""

    capability: int
    shared: int
    dtype: torch.dtype

    def __str__(self) -> str:
        if self.capability == 0:
            return "here"
        return f"sm_{self.capability}-{str(self.dtype).removeprefix('torch.')}"


V100 = Device(70, 96, torch.float16)
T4 = Device(75, 64, torch.float16)
A100 = Device(80, 163, torch.bfloat16)
RTX3090 = Device(86, 99, torch.float16)
H200 = Device(90, 227, torch.bfloat16)
HERE = Device(0, 0, torch.float16)  # the GPU of this machine, by the module of the package


def load() -> ModuleType:
    """Build what has changed and import it; raises CalledProcessError where that fails."""
    builds.build(BUILD, "_cuda_emulated")
    path = BUILD / f"_cuda{builds.SUFFIX}"
    spec = importlib.util.spec_from_file_location("emulated._cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.emulated
    return module


@contextlib.contextmanager
def in_place(module: ModuleType, device: Device = A100) -> Iterator[ModuleType]:
    """slimvit.backends.cuda answers with this module, emulating a device."""
    real = _extensions._attempt
    _extensions._attempt = lambda name: module if name == "_cuda" else real(name)
    become(module, device)
    try:
        yield module
    finally:
        _extensions._attempt = real


def become(module: ModuleType, device: Device) -> None:
    module.emulate(architecture=device.capability, shared_memory=device.shared << 10)
