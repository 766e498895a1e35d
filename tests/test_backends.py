"""Back ends: why one does not work here, and which one is taken."""

import logging
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from references import build, random_images, random_masks
from torch import Tensor, nn

import slimvit
from slimvit import Absorb, Masks
from slimvit.backends import NAMES, choose, select, triton, why_not
from slimvit.backends.fused_checks import tf32_allowed
from slimvit.errors import SlimvitError, UsageError
from slimvit.runtime import accelerate


def test_names():
    assert NAMES == ("torch", "cpu", "triton", "cuda")
    assert {name for names in select._FASTEST_FIRST.values() for name in names} == set(NAMES)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cuda:0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_works_everywhere(device, dtype):
    assert why_not("torch", device, dtype) is None
    assert choose("torch", device, dtype) == "torch"


def test_no_float16_on_the_cpu():
    assert why_not("torch", "cpu", torch.float16) == (
        "float16 is not computed on CPUs: use float32 or bfloat16"
    )
    assert why_not("torch", "cuda", torch.float16) is None
    for name in ("torch", "auto"):
        with pytest.raises(SlimvitError, match="float16"):
            choose(name, "cpu", torch.float16)


@pytest.mark.parametrize("name", NAMES)
def test_a_reason_is_one_line(name):
    reason = why_not(name, "cpu")
    assert reason is None or (reason and "\n" not in reason)


@pytest.mark.parametrize("name", ["tpu", "", "CPU"])
def test_unknown(name):
    with pytest.raises(UsageError, match=f"unknown back end '{name}': one of auto, torch, cpu, tr"):
        why_not(name)
    with pytest.raises(UsageError, match=f"unknown back end '{name}'"):
        choose(name, "cpu", torch.float32)


@pytest.mark.parametrize("where", ["backends", "matmul", "precision"])
def test_tf32_by_whichever_of_torchs_switches(where):
    matmul = torch.backends.cuda.matmul
    holder = torch.backends if where == "backends" else matmul
    before = holder.fp32_precision
    assert not tf32_allowed()
    try:
        if where == "precision":
            torch.set_float32_matmul_precision("high")
        else:
            holder.fp32_precision = "tf32"
        assert tf32_allowed()
    finally:
        if where == "precision":
            torch.set_float32_matmul_precision("highest")
        holder.fp32_precision = before
    assert not tf32_allowed()


def only(*working):
    def why_not(name, device, dtype):
        return None if name in working else f"{name} is not here"

    return why_not


class TestChoice:
    def test_auto_takes_the_fastest_that_works(self, monkeypatch):
        for device, working, taken in (
            ("cuda", NAMES, "triton"),
            ("cuda", ("torch", "cpu", "cuda"), "cuda"),
            ("cuda", ("torch", "cpu"), "torch"),
            ("cpu", NAMES, "cpu"),
            ("cpu", ("torch", "triton", "cuda"), "torch"),
            ("mps", NAMES, "torch"),
        ):
            monkeypatch.setattr(select, "why_not", only(*working))
            assert choose("auto", device, torch.float16) == taken

    def test_auto_leaves_float32_on_gpus_to_torch(self, monkeypatch, caplog):
        monkeypatch.setattr(select, "why_not", only("triton", "torch"))
        assert choose("auto", "cuda", torch.float32) == "torch"
        assert "back end triton passed over: in float32 its products are not" in caplog.text
        assert choose("triton", "cuda", torch.float32) == "triton"

    def test_auto_says_why_it_goes_on(self, monkeypatch, caplog):
        with caplog.at_level(logging.DEBUG, "slimvit"):
            monkeypatch.setattr(select, "why_not", only("cuda", "torch"))
            assert choose("auto", "cuda", torch.float16) == "cuda"
            monkeypatch.setattr(select, "why_not", only("cpu", "torch"))
            assert choose("auto", "cuda", torch.float16) == "torch"
        assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
            ("DEBUG", "back end triton passed over: triton is not here"),
            ("WARNING", "back end triton passed over: triton is not here"),
            ("WARNING", "back end cuda passed over: cuda is not here"),
        ]

    @pytest.mark.parametrize("capability, name", [((7, 0), "sm_70"), ((7, 5), "sm_75")])
    @pytest.mark.triton
    def test_triton_refuses_gpus_without_its_matrix_instructions(
        self, monkeypatch, capability, name
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla")
        reason = f"Triton has no matrix instructions below sm_80, and Tesla is {name}"
        assert why_not("triton", "cuda", torch.float16) == reason
        assert choose("auto", "cuda", torch.float16) == "torch"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
        assert choose("auto", "cuda", torch.float16) == "triton"

    @pytest.mark.triton
    def test_triton_without_a_compiler_for_its_driver(self, monkeypatch):
        class Driver:
            def get_current_device(self) -> int:
                if self.found:
                    return 0
                raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
        monkeypatch.setattr(triton.kernel_set(), "INTERPRETED", False)
        monkeypatch.setattr(triton, "_STARTED", [])
        driver = types.SimpleNamespace(active=Driver())
        monkeypatch.setattr("triton.runtime.driver", driver)
        for driver.active.found in (False, True):
            reason = why_not("triton", "cuda", torch.float16)
            failed = "Triton does not start: Failed to find C compiler."
            assert reason == (None if driver.active.found else failed)

    def test_plain_torch_on_a_cpu_is_worth_a_warning(self, monkeypatch, caplog):
        monkeypatch.setenv("SLIMVIT_ISA", "sse9")
        assert choose("auto", "cpu", torch.float32) == "torch"
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert record.getMessage().startswith("back end cpu passed over: SLIMVIT_ISA must be one")

    def test_auto_finds_none(self, monkeypatch):
        monkeypatch.setattr(select, "why_not", only())
        with pytest.raises(SlimvitError, match=r"no back end computes float32 on cpu: .*not"):
            choose("auto", "cpu", torch.float32)

    def test_an_explicit_one_raises_the_reason(self, monkeypatch):
        monkeypatch.setattr(select, "why_not", only("torch"))
        with pytest.raises(SlimvitError, match=r"back end cpu: cpu is not here \(slimvit doctor"):
            choose("cpu", "cpu", torch.float32)

    @pytest.mark.triton
    def test_triton_refuses_gpus_of_others(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.version, "hip", "6.4")
        reason = "its tiles are made for NVIDIA GPUs, this is AMD's"
        assert why_not("triton", "cuda", torch.float16) == reason


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_a_state_dict_is_not_loaded_into_laid_out_weights(name):
    model = build("deit")
    if (reason := why_not(name, "cpu")) is not None:
        pytest.skip(f"back end {name}: {reason}")
    fast = accelerate(model, random_masks(model), backend=name, precision="float32")
    message = f"back end {name} has weights of its own that no state dict holds"
    for module in (fast, nn.Sequential(fast)):
        with pytest.raises(SlimvitError, match=message):
            module.load_state_dict(module.state_dict())


@pytest.mark.parametrize("name", ["torch", "cpu"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_default_device_does_not_matter(name, dynamic):
    model = build("deit")
    images = random_images(model, 2)

    def answer() -> Tensor:
        masks = Absorb(counts=[12, 8, 1]) if dynamic else Masks.from_counts([12, 8, 1], (4, 4))
        return accelerate(model, masks, backend=name, precision="float32")(images)

    wanted = answer()
    with torch.device("meta"):
        got = answer()
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_forked_process_computes_on_one_thread(run_from, backend):
    """OpenMP's other threads are not there any more, and who waits for them waits for ever."""
    if (reason := why_not(backend, "cpu", torch.float32)) is not None:
        pytest.skip(reason)
    lines = run_from(
        Path(slimvit.__file__).parent.parent,
        "import os, signal, timm, torch, slimvit\n"
        "torch.set_num_threads(2)\n"
        "model = timm.create_model('vit_tiny_patch16_224').eval()\n"
        "plan = slimvit.Absorb(cut=0.4)\n"
        f"fast = slimvit.accelerate(model, plan, backend={backend!r})\n"
        "images = torch.randn(2, 3, 224, 224)\n"
        "wanted = fast(images)\n"
        "if (child := os.fork()) == 0:\n"
        "    signal.alarm(60)\n"
        "    off = (fast(images) - wanted).abs().max() / wanted.abs().max()\n"
        "    print(torch.get_num_threads(), bool(off < 1e-4), flush=True)\n"
        "    os._exit(0)\n"
        "print(os.waitpid(child, 0)[1], torch.get_num_threads())\n",
    )
    assert lines == ["1 True", "0 2"]


@pytest.fixture
def forking(run_from) -> Callable[[str], list[str]]:
    """Run code that has `compute()`, the operator `slim_block` of packed weights; its output."""
    if (reason := why_not("cpu", "cpu", torch.float32)) is not None:
        pytest.skip(reason)
    tests = Path(__file__).parent
    given = (
        f"sys.path.append({str(tests)!r})\n"
        "import os, signal, threading, torch\n"
        "from slimvit.ops import FoldedBlock, pack_block\n"
        "from test_cpu_block import Case, make_parts\n"
        "pack = pack_block(FoldedBlock(make_parts(Case(5, 3))))\n"
        "def compute():\n"
        "    return torch.ops.slimvit.slim_block(torch.zeros(5, 2, 64), pack, 3)\n"
    )
    return lambda code: run_from(Path(slimvit.__file__).parent.parent, given + code)


def test_a_forked_process_may_be_the_first_to_call_an_operator(forking):
    lines = forking(
        "torch.set_num_threads(2)\n"
        "torch.ones(1_000_000).exp()\n"
        "if (child := os.fork()) == 0:\n"
        "    signal.alarm(20)\n"
        "    print(bool(compute().isfinite().all()), flush=True)\n"
        "    os._exit(0)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    assert lines == ["True", "0"]


@pytest.fixture
def forking_beside(forking) -> Callable[[str], list[str]]:
    """Fork a process that computes while a thread does what code says in `serve`; its statuses."""
    return lambda code: forking(
        f"torch.set_num_threads(1)\n{code}"
        "for _ in range(2): threading.Thread(target=serve, daemon=True).start()\n"
        "statuses = set()\n"
        "for _ in range(50):\n"
        "    if (child := os.fork()) == 0:\n"
        "        signal.alarm(20)\n"
        "        compute()\n"
        "        os._exit(0)\n"
        "    statuses.add(os.waitpid(child, 0)[1])\n"
        "    if statuses != {0}: break\n"
        "print(*statuses, flush=True)\n"
        "os._exit(0)\n"
    )


def test_a_process_may_fork_while_its_threads_compute(forking_beside):
    """What they hold at that moment is not held for ever in the child."""
    assert forking_beside("def serve():\n    while True: compute()\n") == ["0"]


def test_a_process_may_fork_while_its_threads_copy_weights(forking_beside):
    """Those that lie where kernels cannot read them, as what torch.export.load reads may."""
    lines = forking_beside(
        "room = torch.empty(pack.numel() + 128, dtype=torch.uint8)\n"
        "start = -room.data_ptr() % 64 + 1\n"
        "pack = room[start : start + pack.numel()].copy_(pack)\n"
        "def serve():\n"
        "    while True:\n"
        "        pack.add_(0)\n"
        "        compute()\n"
    )
    assert lines == ["0"]
