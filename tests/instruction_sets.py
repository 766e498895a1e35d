"""Every instruction set that C++ kernels are written for, forced in turn."""

import platform

import pytest
import torch

from slimvit import _extensions

if (reason := _extensions.why_not("_cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16]
_OFFERED = _extensions.load("_cpu").instruction_sets()

# AMX is emulated where the module is one that tests/sanitized.py builds.
X86 = ["avx2", "avx512", "avx512_bf16", "amx"]
ARM = ["neon", "neon_bf16"]
SETS = ["portable", *(ARM if platform.machine() in ("aarch64", "arm64") else X86)]


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Packs that are made within the test are for this instruction set."""
    if request.param not in _OFFERED:
        pytest.skip(f"this processor offers only {', '.join(_OFFERED)}")
    monkeypatch.setenv("SLIMVIT_ISA", request.param)
    return request.param
