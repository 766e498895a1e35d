"""The CUDA kernels in tests: in emulated devices, on CPU tensors, or on the GPU that is here."""

import pytest
import torch
from emulated import A100, H200, HERE, RTX3090, T4, V100, Device, become

from slimvit import _extensions
from slimvit.backends import cuda_kernels as kernels  # noqa: F401  what the tests call

# All cases run on these two, one for each generation of tensor cores; a few on the others, which
# differ in how much shared memory there is.
devices = pytest.mark.parametrize("device", [V100, A100], ids=str)
devices_and_here = pytest.mark.parametrize("device", [V100, A100, HERE], ids=str)
all_devices = pytest.mark.parametrize("device", [V100, T4, A100, RTX3090, H200], ids=str)


def use(device: Device) -> torch.dtype:
    """Emulate a device from now on, unless it is the real one; what to compute in there."""
    if device != HERE:
        become(_extensions.load("_cuda"), device)
    return device.dtype


def place(device: Device) -> torch.device:
    """Where the tensors of a test lie."""
    return torch.device("cuda" if device == HERE else "cpu")
