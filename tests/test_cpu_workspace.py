"""How much memory a call of the C++ kernels takes, and what is said where there is too little."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cpu_vit import threads  # noqa: F401
from timm.models.vision_transformer import VisionTransformer

from slimvit import DPS, Absorb, Masks, SPViT
from slimvit.backends.cpu_module import call
from slimvit.errors import SlimvitError
from slimvit.runtime import AcceleratedViT, accelerate

TESTS = Path(__file__).parent
TOKENS = 4097  # as many squared are 64 MiB of float32
PLANS = {
    "dense": lambda: Masks.dense(2, (64, 64), 1),
    "predictors": lambda: DPS([3000, 1]),
    "selectors": lambda: SPViT((0.5,), stages=(0,)),
    "attention": lambda: Absorb(counts=[TOKENS - 2, 1]),
}
LITTLE_MEMORY = """
import resource, torch
from test_cpu_workspace import make
from slimvit.errors import SlimvitError

torch.set_num_threads(1)
fast, images = make("dense"), torch.zeros(1, 3, 512, 512)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
unlimited = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), unlimited[1]))
try:
    fast(images)
except SlimvitError as error:
    print(error, "<-", repr(error.__cause__))
resource.setrlimit(resource.RLIMIT_AS, unlimited)
assert fast(images).isfinite().all()
"""


def make(plan: str) -> AcceleratedViT:
    with torch.random.fork_rng(devices=[]):
        options = {"embed_dim": 64, "depth": 2, "num_heads": 1, "mlp_ratio": 1, "num_classes": 5}
        model = VisionTransformer(512, 8, **options).eval()
        return accelerate(model, PLANS[plan](), backend="cpu")


def reserved() -> int:
    """Bytes that this process has asked for, used or not."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * 4096


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("plans", [("dense",), ("predictors", "selectors", "attention")], ids=str)
def test_memory_does_not_grow_by_what_nobody_uses(plans):
    """Eight threads at one image: each has room for its rows of attention, the image is one."""
    models = [make(plan) for plan in plans]
    images = torch.zeros(1, 3, 512, 512)
    small = accelerate(
        VisionTransformer(32, 16, embed_dim=16, depth=1, num_heads=1).eval(),
        Masks.dense(1, (2, 2), 1),
        backend="cpu",
    )
    torch.set_num_threads(8)
    small(torch.zeros(1, 3, 32, 32))  # what the threads take for themselves
    before = reserved()
    for fast in models:
        assert fast(images).shape == (1, 5)
    assert reserved() - before < 48 << 20


@pytest.mark.parametrize("given", ["std::bad_alloc", ""])
def test_too_little_memory_is_an_error_of_ours(given):
    def refuse() -> None:
        raise MemoryError(given)

    with pytest.raises(SlimvitError, match="no memory for the workspace of so many tokens") as got:
        call(refuse)
    assert isinstance(got.value.__cause__, MemoryError)


def test_a_call_after_one_without_memory():
    command = [sys.executable, "-c", LITTLE_MEMORY]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no memory for the workspace" in done.stdout
    assert "MemoryError('std::bad_alloc')" in done.stdout
