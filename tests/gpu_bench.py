"""The benchmarks' modules, whose folder is no package, as tests import them."""

import importlib
import os
import resource
import signal
import time
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


def fated(task):
    """Ends as the model's name says, in the place of `gpu_kernels.answer`, in whatever process."""
    if task.network.model == "dies":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), signal.SIGSEGV)
    if task.network.model == "hangs":
        time.sleep(600)
    verdict = importlib.import_module("gpu_calls").Verdict(0.001, 0.001, 0.002)
    check = importlib.import_module("gpu_kernels").Check
    return [check(*task[:3], "slim", 1, f"by {os.getpid()}", verdict)]


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
