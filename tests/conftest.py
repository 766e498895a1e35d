"""What all tests share. The environment is set before torch is imported, which reads it once."""

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # idle threads must not starve other processes
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test depends on a download

import torch

# Read when triton is imported, as timm does. It has no matrix instructions below sm_80.
if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent

pytest_plugins = ("commands", "gpu_bench")  # fixtures of several rooms

# Of processes that test side by side each has its share; what depends on threads sets them itself.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, min(4, torch.get_num_threads() // WORKERS)))
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import interpreter

    interpreter.hasten()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of Triton's kernels are skipped where it is not installed."""
    if importlib.util.find_spec("triton"):
        return
    for item in items:
        if item.get_closest_marker("triton"):
            item.add_marker(pytest.mark.skip(reason="Triton is not installed"))


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of the real DeiT-Ti, ViT-Ti and images, which SLIMVIT_REAL names."""
    named = os.environ.get("SLIMVIT_REAL")
    folder = Path(named) if named else ROOT.parent / "shared" / "real"
    if (folder / "deit_tiny_patch16_224.safetensors").is_file():
        return folder
    if named:
        pytest.fail(f"SLIMVIT_REAL={named} holds no deit_tiny_patch16_224.safetensors")
    pytest.skip("no real model and images: SLIMVIT_REAL names no folder that has them")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt; what starts the tests may ignore them."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def fresh_compiler() -> None:
    """torch.compile as a new process has it: it compiles the same code a few times only."""
    torch.compiler.reset()


@pytest.fixture
def tiny_vit() -> torch.nn.Module:
    """A fresh ViT in eval mode: 6 blocks, width 64, 2 heads, 4 x 4 patches of 16, 10 classes.

    Every parameter is random, so that no bias is zero and no norm the identity.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_vit", img_size=64, num_classes=10)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.fixture
def labelled() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random images of `tiny_vit` and their labels, three times six."""
    torch.manual_seed(1)
    return [(torch.randn(6, 3, 64, 64), torch.randint(10, (6,))) for _ in range(3)]


@pytest.fixture
def batches() -> list[torch.Tensor]:
    """Ten random images of `tiny_vit` by three, to search with."""
    torch.manual_seed(3)
    return list(torch.randn(10, 3, 64, 64).split(3))


@pytest.fixture
def pair(tiny_vit) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A slim copy of `tiny_vit`, ready to train, and the dense model."""
    from slimvit import Masks, apply_masks

    return apply_masks(tiny_vit, Masks.from_counts([17, 9, 9, 7, 5, 1], (4, 4))), tiny_vit


@pytest.fixture
def prune(tiny_vit, tmp_path, monkeypatch, capsys):
    """`slimvit prune` of a tiny ViT on 6 images, in an empty folder: (status, stdout, stderr)."""
    from slimvit.cli import main

    monkeypatch.chdir(tmp_path)
    save_file(tiny_vit.state_dict(), "model.safetensors")
    noise = np.random.default_rng(0)
    Path("images/a").mkdir(parents=True)
    for i in range(6):
        pixels = noise.integers(0, 255, (70, 66, 3), np.uint8)
        Image.fromarray(pixels).save(f"images/a/{i}.png")
    arguments = ["prune", "--model", "test_vit", "--img-size", "64", "--num-classes", "10"]
    arguments += ["--checkpoint", "model.safetensors", "--data-dir", "images", "-b", "4"]
    arguments += ["--device", "cpu", "--output", "plan.safetensors"]

    def call(*extra):
        return main([*arguments, *extra]), *capsys.readouterr()

    return call


@pytest.fixture
def poison_empty():
    """Uninitialised memory (torch.empty and its kin) is NaN, so that an unwritten output fails."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture(scope="session")
def emulation() -> ModuleType:
    """The CUDA kernels on emulated devices; a quarter of a minute the first time."""
    import emulated

    if (reason := emulated.why_not()) is not None:
        pytest.skip(f"the CUDA kernels cannot be emulated: {reason}")
    try:
        return emulated.load()
    except subprocess.CalledProcessError as error:
        pytest.fail(error.output)


@pytest.fixture
def emulated_cuda(request, monkeypatch) -> ModuleType:
    """That module in the place of slimvit._cuda, and the tensors of all tests on the CPU.

    A test whose device is HERE gets neither: what it calls runs on the GPU.
    """
    import emulated

    from slimvit import _extensions, backends

    here = getattr(request.node, "callspec", None)
    here = here is not None and here.params.get("device") == emulated.HERE
    if here and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    if here and (reason := backends.why_not("cuda", "cuda", emulated.HERE.dtype)) is not None:
        pytest.fail(reason)
    modules = ("absorb_checks", "fused_blocks", "kernel_checks")
    modules += ("test_fused_block_ops", "test_fused_dynamic")
    for name in modules:
        if name in sys.modules:
            where = torch.device("cuda" if here else "cpu")
            monkeypatch.setattr(sys.modules[name], "DEVICE", where)
    if here:
        return _extensions.load("_cuda")
    emulation = request.getfixturevalue("emulation")
    # By the same monkeypatch as the tests', so that all is undone in its order.
    real = _extensions._attempt
    monkeypatch.setattr(
        _extensions, "_attempt", lambda name: emulation if name == "_cuda" else real(name)
    )
    emulated.become(emulation, emulated.A100)
    return emulation


@pytest.fixture
def run_from() -> Callable[[Path, str], list[str]]:
    """Run code with `folder` first on sys.path and blind to an editable install; its output."""
    blind = "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]"

    def run(folder: Path, code: str) -> list[str]:
        code = f"import sys; {blind}; sys.path.insert(0, {str(folder)!r})\n{code}"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd="/", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run
