"""The CUDA kernels in tests: in emulated devices, on CPU tensors."""

import pytest
import torch
from emulated import A100, H200, RTX3090, T4, V100, Device, become

from slimvit import _extensions
from slimvit.backends import cuda_kernels as kernels  # noqa: F401  what the tests call

# All cases run on these two, one for each generation of tensor cores; a few on the others, which
# differ in how much shared memory there is.
devices = pytest.mark.parametrize("device", [V100, A100], ids=str)
all_devices = pytest.mark.parametrize("device", [V100, T4, A100, RTX3090, H200], ids=str)


def use(device: Device) -> torch.dtype:
    """Emulate a device from now on; what to compute in there."""
    become(_extensions.load("_cuda"), device)
    return device.dtype
