"""The benchmarks' modules, whose folder is no package, as tests import them."""

import importlib
from pathlib import Path

import pytest
import torch

from slimvit import _extensions

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
MODELS = tuple(f"deit_{size}_patch16_224" for size in ("tiny", "small", "base"))
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"
)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def bench():
    """The benchmarks' modules by name; their folder is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module


@pytest.fixture(scope="module")
def configs():
    _extensions.load("kernels")
    return importlib.import_module("slimvit.kernels.configs")
