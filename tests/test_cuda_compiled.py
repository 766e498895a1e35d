"""What compilers make of the CUDA kernels, for GPUs that need not be here."""

import re
from collections import Counter
from pathlib import Path

import machine_code
import nvrtc
import pytest
from machine_code import Kernel

from slimvit import _extensions

if (reason := machine_code.why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"
# Each architecture has all kernels; those of another generation of tensor cores are empty there.
VOLTA, AMPERE = {"Volta"}, {"__half", "__nv_bfloat16"}
SELECTOR = {"selector_embed", "selector_judge"}  # small products of what is read once
PRODUCTS = {"absorb_scores", "slim_linear", "slim_attention", "fused_block"} | SELECTOR
PLAIN = {"last_attention", "row_stats", "scatter_tokens", "package_tokens", "selector_choose"}
PLAIN |= {"absorb_importance", "absorb_merge", "absorb_select", "top_tokens"}
# Bytes a thread, stack included. Twelve warps of a whole block leave 168 registers to each thread.
MOST_SPILLED = {"fused_block __half 192 12": 288, "fused_block __nv_bfloat16 192 12": 288}
MOST_OF_OTHERS = 16
EMPTY = 16  # instructions: an exit, and what fills a line of the cache
REGISTERS = 65536  # of a multiprocessor


@pytest.fixture(scope="module")
def cubins(tmp_path_factory) -> list[tuple[Path, int]]:
    module = _extensions.load("_cuda")
    if module is None:
        pytest.skip(_extensions.why_not("_cuda"))
    return machine_code.cubins(Path(module.__file__), tmp_path_factory.mktemp("cubins"))


@pytest.fixture(scope="module")
def compiled(cubins) -> list[Kernel]:
    return [kernel for cubin, arch in cubins for kernel in machine_code.kernels(cubin, arch)]


def runs(kernel: Kernel) -> bool:
    """Whether a kernel that multiplies matrices is meant for its architecture."""
    family = AMPERE if kernel.arch >= 80 else VOLTA
    return bool(family & set(kernel.name.split()))


def products(compiled: list[Kernel]) -> list[Kernel]:
    return [kernel for kernel in compiled if kernel.name.split()[0] in PRODUCTS]


def threads(kernel: Kernel) -> int:
    """The most of a block, as the launchers have it."""
    name, *rest = kernel.name.split()
    if name == "slim_linear":
        return 2 * int(rest[-1])
    if name == "slim_attention":
        return 128 if "Volta" in rest else 256 if rest[-1] == "128" else 512
    if name == "fused_block":
        return 32 * int(rest[-1])
    if name == "absorb_scores":
        return 256 if rest[-1] == "16" else 128
    if name in ("absorb_merge", "package_tokens", *SELECTOR):
        return 128
    if name in ("absorb_select", "selector_choose", "top_tokens"):
        return 1024
    return 512 if name == "last_attention" else 256


def fewest_products(kernel: Kernel) -> int:
    """Of 16 x 16 by 16, in a kernel's code."""
    if kernel.name.split()[0] in SELECTOR:
        return 1
    few_rows = kernel.name.startswith("absorb_scores") and kernel.name.endswith("16")
    return 4 if few_rows else 16


def broken(compiled: list[Kernel]) -> list[str]:
    """Kernels that do not fit a multiprocessor, or spill."""
    return [
        str(kernel)
        for kernel in compiled
        if kernel.spilled > MOST_SPILLED.get(kernel.name, MOST_OF_OTHERS)
        or kernel.registers * threads(kernel) > REGISTERS
    ]


def test_every_architecture_has_all_kernels(compiled):
    built = _extensions.load("_cuda").architectures()
    names = {arch: set() for arch in map(int, re.findall(r"\d+", built))}
    for kernel in compiled:
        names[kernel.arch].add(kernel.name)
    first = next(iter(names.values()))
    assert {name.split()[0] for name in first} >= {
        "absorb_scores",
        "slim_linear",
        "slim_attention",
        *SELECTOR,
        *PLAIN,
    }
    assert all(others == first for others in names.values())


def test_the_other_generation_is_empty(compiled):
    for kernel in products(compiled):
        assert (kernel.code["all"] > EMPTY) == runs(kernel), kernel


def test_registers_suffice(compiled):
    assert broken(compiled) == []


def test_shared_memory_is_the_launchers_to_give(compiled):
    """None is declared in a kernel: what a launcher asks for is all that a block uses."""
    for kernel in compiled:
        assert kernel.shared <= (1024 if kernel.arch >= 90 else 0), kernel  # the system's own


def test_tensor_cores_and_asynchronous_copies_are_used(compiled):
    seen = Counter()
    for kernel in filter(runs, products(compiled)):
        newer = kernel.arch >= 80
        assert kernel.code["HMMA"] >= 2 * fewest_products(kernel), kernel
        copies = newer and kernel.name.split()[0] not in SELECTOR
        assert (kernel.code["LDGSTS"] > 0) == copies, kernel
        assert (kernel.code["LDSM"] > 0) == newer or kernel.arch == 75, kernel
        seen[kernel.arch] += 1
    assert set(seen) == {kernel.arch for kernel in compiled}


def test_a_disassembler_finds_the_same_instructions(cubins):
    for wanted in (75, 90):
        found = [
            path for path, arch in cubins if arch == wanted and b"slim_linear" in path.read_bytes()
        ]
        if not found:
            continue
        text = machine_code.run(machine_code.tool("nvdisasm"), "-c", found[0])
        code = sum((kernel.code for kernel in machine_code.kernels(found[0], wanted)), Counter())
        for name in ("HMMA", "LDGSTS", "LDSM"):
            assert len(re.findall(rf"\b{name}\b", text)) == code[name]


class TestVolta:
    """sm_70, for which compilers of CUDA 13 make no code: by CUDA 12's."""

    @pytest.fixture(scope="class")
    def volta(self, tmp_path_factory) -> list[Kernel]:
        if (reason := nvrtc.why_not()) is not None:
            pytest.skip(reason)
        found = []
        products = "absorb_scores", "slim_linear", "slim_attention", *sorted(SELECTOR)
        for name in (*products, *sorted(PLAIN)):
            cubin = tmp_path_factory.mktemp("volta") / f"{name}.cubin"
            cubin.write_bytes(nvrtc.compile_for(70, CUDA / f"{name}.cu"))
            found += machine_code.kernels(cubin, 70)
        return found

    def test_registers_suffice(self, volta):
        assert {kernel.name.split()[0] for kernel in volta} >= {"slim_linear", "row_stats"}
        assert broken(volta) == []

    def test_tensor_cores_are_used(self, volta):
        """16 instructions for each product of 16 x 16 x 16."""
        for kernel in products(volta):
            enough = kernel.code["HMMA.884"] >= 16 * fewest_products(kernel)
            assert enough == runs(kernel), kernel
            assert kernel.code["HMMA.884"] % 16 == 0, kernel
            assert (kernel.code["all"] > EMPTY) == runs(kernel), kernel

    def test_an_error_is_told(self, tmp_path):
        if (reason := nvrtc.why_not()) is not None:
            pytest.skip(reason)
        (tmp_path / "wrong.cu").write_text("__global__ void kernel() { missing(); }")
        with pytest.raises(RuntimeError, match=r'wrong.cu\(1\): error: identifier "missing"'):
            nvrtc.compile_for(70, tmp_path / "wrong.cu")
