"""Compiled modules: what they answer, and the reason where one cannot be imported."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from slimvit import _extensions

ROOT = Path(__file__).parent.parent
SETS = ["portable", "avx2", "avx512", "avx512_bf16", "amx", "neon", "neon_bf16"]


@pytest.fixture
def attempt(monkeypatch, tmp_path):
    """The uncached attempt, reading notes and other builds from an empty folder."""
    monkeypatch.setattr(_extensions, "_PACKAGE", tmp_path / "slimvit")
    (tmp_path / "slimvit").mkdir()
    return _extensions._attempt.__wrapped__


@pytest.fixture
def cpu():
    module = _extensions.load("_cpu")
    assert module is not None, _extensions.why_not("_cpu")
    return module


def test_instruction_sets_are_the_processors(cpu):
    flags = set(Path("/proc/cpuinfo").read_text().split())
    needed = {
        "neon": {"asimd"},
        "neon_bf16": {"asimd", "bf16"},
        "avx2": {"avx2", "fma"},
        "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx512_bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
        "amx": {"avx512_bf16", "amx_tile", "amx_bf16"},
    }
    expected = ["portable", *(name for name, names in needed.items() if names <= flags)]
    assert cpu.instruction_sets() == expected


def test_the_fastest_is_chosen(cpu, monkeypatch):
    monkeypatch.delenv("SLIMVIT_ISA", raising=False)
    assert cpu.chosen() == cpu.instruction_sets()[-1]
    monkeypatch.setenv("SLIMVIT_ISA", "")
    assert cpu.chosen() == cpu.instruction_sets()[-1]


@pytest.mark.parametrize("name", SETS)
def test_a_forced_instruction_set(cpu, monkeypatch, name):
    monkeypatch.setenv("SLIMVIT_ISA", name)
    if name in cpu.instruction_sets():
        assert cpu.chosen() == name
    else:
        with pytest.raises(ValueError, match=f"SLIMVIT_ISA={name}: this processor offers only"):
            cpu.chosen()


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx2 ", "avx512_bf"])
def test_an_unknown_instruction_set_is_refused(cpu, monkeypatch, name):
    monkeypatch.setenv("SLIMVIT_ISA", name)
    with pytest.raises(ValueError, match=f"must be one of {', '.join(SETS)}, got '{name}'"):
        cpu.chosen()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here")
def test_one_openmp_runtime_serves_torch_and_the_kernels(cpu):
    script = (
        "from slimvit import _extensions; _extensions.load('_cpu')\n"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.count("gomp") == 1, done.stdout + done.stderr


def test_cuda_answers_with_and_without_a_gpu():
    cuda = _extensions.load("_cuda")
    if cuda is None:
        pytest.skip(_extensions.why_not("_cuda"))
    assert cuda.architectures()
    assert cuda.runtime().count(".") == 1
    assert cuda.probe(1000)  # there is no such device
    if cuda.why_not() is None:
        assert cuda.devices()
        assert cuda.probe(0) is None
    else:
        assert cuda.devices() == []
        assert cuda.probe(0)


@pytest.mark.triton
def test_kernels_are_installed():
    kernels = _extensions.load("kernels")
    assert kernels is not None, _extensions.why_not("kernels")
    assert kernels.__name__ == "slimvit.kernels"


def test_a_loaded_module_has_no_reason():
    assert _extensions.why_not("_cpu") is None


def test_a_module_that_was_not_built(attempt):
    assert attempt("_none") == (
        "slimvit._none is not built: install slimvit where there is a C++ compiler"
    )
    assert _extensions._not_built("_cuda").endswith("where there is a CUDA compiler")


def test_the_note_of_the_build_is_the_reason(attempt):
    note = _extensions._PACKAGE / "_none.not_built.txt"
    note.write_text("no CUDA compiler\nwas found\n")
    assert attempt("_none") == "slimvit._none is not built: no CUDA compiler was found"


def test_a_module_built_for_another_python(attempt):
    (_extensions._PACKAGE / "_none.cpython-27-x86_64.so").touch()
    assert "built for another Python: _none.cpython-27-x86_64.so" in attempt("_none")


def test_a_module_that_does_not_load(attempt, monkeypatch):
    def broken(name):
        raise ImportError("libcudart.so.13:\n cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    reason = "slimvit._cpu cannot be imported: libcudart.so.13: cannot open shared object file"
    assert attempt("_cpu") == reason


@pytest.mark.triton
def test_kernels_of_a_checkout_that_is_not_installed(tmp_path, run_from):
    for part in ("slimvit", "kernels"):
        (tmp_path / part).symlink_to(ROOT / part)
    lines = run_from(
        tmp_path,
        "from slimvit import _extensions\n"
        "kernels = _extensions.load('kernels')\n"
        "assert kernels is sys.modules['slimvit.kernels'], _extensions.why_not('kernels')\n"
        "print(kernels.__file__)\n",
    )
    assert lines == [str(tmp_path / "kernels" / "__init__.py")]


def test_bare_kernels_are_refused_with_the_cure():
    command = [sys.executable, "-c", "import kernels"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "ImportError: this folder is slimvit.kernels" in done.stderr
    assert "import slimvit.kernels" in done.stderr
