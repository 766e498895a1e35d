"""The ops over the CUDA kernels, emulated, as PyTorch sees them, and what they refuse."""

import threading

import emulated
import pytest
import torch
from cuda_checks import devices, kernels, use
from emulated import A100, T4, V100, Device
from fused_blocks import Case, inputs, make
from kernel_checks import Random
from references import build, random_masks
from test_fused_block_ops import Embedded, arguments

from slimvit import _extensions, backends, ops
from slimvit.errors import SlimvitError
from slimvit.runtime import accelerate

pytestmark = pytest.mark.usefixtures("emulated_cuda")
HALF, BFLOAT16 = torch.float16, torch.bfloat16


class TestOps:
    @pytest.mark.parametrize(
        "case",
        [
            Case(5, 3, width=16, index=True, key_bias="Bm"),
            Case(5, 3, width=112, idle=True, zero_rows=3),
            Case(5, 1, width=16, last=True, key_bias="m"),
        ],
        ids=str,
    )
    def test_opcheck_of_a_block(self, case):
        given = arguments(case, use(A100), backend="cuda")
        torch.library.opcheck(torch.ops.slimvit.fused_block, (), given)

    def test_opcheck_of_the_others(self):
        dtype, random = use(A100), Random()
        order, own = torch.tensor([0, 3, 1, 2, 4]), {"backend": "cuda"}
        table, weight = random(5, 48), random(48, 3, 8, 8, dtype=dtype)
        for images in (random(2, 3, 16, 16), random(2, 3, 16, 16, dtype=dtype)):
            given = images, weight, table, order, 1
            torch.library.opcheck(torch.ops.slimvit.patch_embedding, given, own)
        for index in (order[:3], random.index(2, 3, 7)):
            given = random(2, 3, 16, dtype=dtype), index, 7
            torch.library.opcheck(torch.ops.slimvit.scatter_tokens, given, own)

    @devices
    @pytest.mark.parametrize("idle", [False, True])
    @pytest.mark.usefixtures("fresh_compiler")
    def test_compile(self, device, idle):
        module = Embedded(idle, use(device), "cuda")
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            for batch in (3, 1, 5):
                images = Random(batch)(batch, 3, 16, 16)
                assert torch.equal(compiled(images), module(images))

    def test_other_threads_go_on(self):
        """A launch waits where the device's queue is full."""
        random, dtype, seen, stop = Random(), use(A100), [0], threading.Event()
        x, weight = random(2, 256, 192, dtype=dtype), random.weight(576, 192, dtype)

        def count() -> None:
            while not stop.wait(0.001):
                seen[0] += 1

        other = threading.Thread(target=count)
        other.start()
        before = seen[0]
        kernels.slim_linear(x, weight, None)
        during = seen[0] - before
        stop.set()
        other.join()
        assert during > 10

    def test_equals_the_reference_scatter(self):
        x, index = Random()(2, 3, 16, dtype=use(V100)), Random().index(2, 3, 7)
        got = torch.ops.slimvit.scatter_tokens(x.mT.contiguous().mT, index, 7, backend="cuda")
        assert torch.equal(got, ops.scatter_tokens(x, index, 7))


class TestDevices:
    @pytest.mark.parametrize(
        ("device", "reason"),
        [
            (V100._replace(dtype=torch.float32), "it computes float16 and bfloat16, not float32"),
            (A100._replace(dtype=torch.float64), "it computes float16 and bfloat16, not float64"),
            (V100._replace(dtype=BFLOAT16), "bfloat16 needs sm_80, this is sm_70: use float16"),
            (T4._replace(dtype=BFLOAT16), "bfloat16 needs sm_80, this is sm_75: use float16"),
            (Device(61, 48, HALF), "it has tensor-core kernels for sm_70 and newer, this is sm_61"),
        ],
        ids=str,
    )
    def test_refused(self, device, reason):
        dtype, case = use(device), Case(7, 3, 2)
        assert backends.why_not("cuda", "cpu", dtype).startswith(reason)
        with pytest.raises(SlimvitError, match=f"^back end cuda: {reason}"):
            make(case, dtype, backend="cuda")(*inputs(case, dtype)[:2])
        if dtype != torch.float64:
            model, precision = build("depth_1"), str(dtype).removeprefix("torch.")
            with pytest.raises(SlimvitError, match=f"^back end cuda: {reason}"):
                accelerate(model, random_masks(model), backend="cuda", precision=precision)

    @pytest.mark.parametrize("device", [V100, T4, A100, A100._replace(dtype=HALF)], ids=str)
    def test_taken(self, device):
        assert backends.why_not("cuda", "cpu", use(device)) is None

    def test_other_devices(self):
        reason = "it computes on CUDA GPUs, not on meta"
        assert backends.why_not("cuda", "meta", use(A100)) == reason

    def test_afterwards_all_is_as_before(self, emulation):
        assert _extensions.load("_cuda") is emulation
        with emulated.in_place(emulation, T4):
            assert emulation.capability() == 75
        assert _extensions.load("_cuda") is emulation


class TestWithoutCode:
    """A module that was built for other GPUs than the one that is there."""

    @pytest.mark.parametrize(
        ("capability", "cure"),
        [
            ((7, 0), "CUDA 12 (CUDACXX=/path/of/12/bin/nvcc), for compilers of CUDA 13 leave it"),
            ((8, 9), "TORCH_CUDA_ARCH_LIST=8.9"),
            ((12, 1), "TORCH_CUDA_ARCH_LIST=12.1"),
        ],
    )
    def test_has_its_cure(self, monkeypatch, capability, cure):
        self.pretend(monkeypatch, capability, "no kernel image (cudaErrorNoKernelImageForDevice)")
        reason = backends.why_not("cuda", "cuda:0", HALF)
        name = f"sm_{capability[0]}{capability[1]}"
        assert reason.startswith(f"it was built without code for {name} (75-real 80-real): ")
        assert f"build slimvit with {cure}" in reason

    def test_another_failure_is_told_as_it_is(self, monkeypatch):
        self.pretend(monkeypatch, (9, 0), "out of memory (cudaErrorMemoryAllocation)")
        assert backends.why_not("cuda", "cuda", HALF).startswith("out of memory")

    def test_a_gpu_without_memory_to_spare_is_asked_again(self, monkeypatch):
        failures = ["out of memory (cudaErrorMemoryAllocation)", None]
        self.pretend(monkeypatch, (9, 0), "")
        monkeypatch.setattr(backends.cuda.module(), "probe", lambda index: failures.pop(0))
        assert backends.why_not("cuda", "cuda", HALF).startswith("out of memory")
        assert backends.why_not("cuda", "cuda", HALF) is None
        assert backends.why_not("cuda", "cuda", HALF) is None  # without another probe

    def pretend(self, monkeypatch, capability: tuple[int, int], failure: str) -> None:
        class Module:
            why_not = staticmethod(lambda: None)
            probe = staticmethod(lambda index: failure)
            architectures = staticmethod(lambda: "75-real 80-real")

        real = _extensions._attempt
        monkeypatch.setattr(
            _extensions, "_attempt", lambda name: Module if name == "_cuda" else real(name)
        )
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(backends.cuda, "_RUN_ON", set())


class TestRefused:
    """Whatever a kernel would read beyond its end or take for something else."""

    def refuses(self, message: str, **changes: object) -> None:
        given = arguments(Case(7, 3, 2), use(V100), backend="cuda", **changes)
        with pytest.raises(SlimvitError, match=f"^back end cuda: {message}"):
            torch.ops.slimvit.fused_block(**given)

    def test_arguments_of_a_block(self):
        random = Random()
        shape = r"x must be \[B, m, D\] with D = 48, float16, on cpu, got "
        self.refuses(shape + r"\[2, 7, 64\], float16", x=random(2, 7, 64, dtype=HALF))
        self.refuses(shape + r"\[2, 7, 48\], float32", x=random(2, 7, 48))
        self.refuses(r"n must be in \[1, m\] = \[1, 7\], got 8", n=8)
        many = random(1, 7, 48, dtype=HALF).expand(65536, -1, -1)
        self.refuses("a batch must have at most 65535 images, got 65536", x=many)
        self.refuses(r"stats must be .*, got \[2, 7, 1, 2\]", stats=random(2, 7, 1, 2))
        self.refuses(r"index must be \[B, n\] = \[2, 3\]", index=random.index(2, 2, 7))
        self.refuses(r"key_bias must be \[m\] = \[7\]", key_bias=random(6))
        self.refuses("activation must be one of none, gelu", activation="relu")

    def test_sizes_of_rows(self):
        dtype, random = use(V100), Random()
        x, weight, other = (random(*s, dtype=dtype) for s in ((1, 3, 12), (16, 12), (12, 16)))
        q, kv, wide = (random(1, 3, width, dtype=dtype) for width in (136, 272, 1032))
        stats, eight = random(1, 3, 1, 2), "must be a multiple of 8, got 12$"
        wrong = {
            f"inner {eight}": lambda: kernels.slim_linear(x, weight, None),
            f"columns {eight}": lambda: kernels.slim_linear(q[..., :16], other, None),
            f"width {eight}": lambda: kernels.row_stats(x),
            f"head_dim {eight}": lambda: kernels.slim_attention(x, kv[..., :24], 1),
            "head_dim must be at most 128, got 136$": lambda: kernels.slim_attention(q, kv, 1),
            "width must be at most 1024, got 1032$": lambda: kernels.last_attention(
                wide, stats, wide[:, :1], 64, eps=1e-6
            ),
        }
        many = torch.zeros(65536, 1, 32, dtype=HALF)
        wrong["batch must be at most 65535, got 65536$"] = lambda: kernels.slim_attention(
            many[..., :16].contiguous(), many, 1
        )
        for message, call in wrong.items():
            with pytest.raises(SlimvitError, match=f"^back end cuda: {message}"):
                call()
        with pytest.raises(SlimvitError, match=f"^back end cuda: width {eight}"):
            torch.ops.slimvit.scatter_tokens(x, torch.arange(3), 5, backend="cuda")
        with pytest.raises(SlimvitError, match="a batch must have at most 65535 images, got 65536"):
            torch.ops.slimvit.scatter_tokens(many, torch.arange(1), 5, backend="cuda")

    def test_rows_that_begin_anywhere(self):
        use(V100)
        x = torch.zeros(3 * 16 + 1, dtype=HALF)[1:].view(1, 3, 16)
        rule = "x must begin at a multiple of 16 bytes, got one [0-9]+ beyond: clone it$"
        with pytest.raises(SlimvitError, match=f"^back end cuda: {rule}"):
            torch.ops.slimvit.scatter_tokens(x, torch.arange(3), 5, backend="cuda")
        torch.ops.slimvit.scatter_tokens(x.clone(), torch.arange(3), 5, backend="cuda")

    def test_dtypes_of_the_other_ops(self):
        random, message = Random(), "^back end cuda: it computes float16 and bfloat16, not float"
        with pytest.raises(SlimvitError, match=message):
            torch.ops.slimvit.scatter_tokens(random(1, 3, 16), torch.arange(3), 5, backend="cuda")
        given = random(2, 3, 16, 16), random(48, 3, 8, 8), random(5, 48), torch.arange(5), 1
        with pytest.raises(SlimvitError, match=message):
            torch.ops.slimvit.patch_embedding(*given, backend="cuda")
