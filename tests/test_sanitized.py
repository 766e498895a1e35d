"""A few kernel tests under AddressSanitizer and UBSan; `make sanitize` runs all of them.

AMX is emulated there, and here its products are tested whole: few processors have them.
"""

import subprocess
import sys

import pytest
import sanitized

from slimvit import _extensions

# Odd sizes, every option of the op, two networks, all instruction sets.
BLOCK = "errs_no_more_than_torch and (quick_gelu or many or twice) or TestRefused"
NETWORK = "test_float32 and (deit_distilled or oblong)"
CHOICE = "by_its_choice and (5to3 or 63to62) or nothing_but_nan"
SELECTION = "packages_the_others and 257 or favours and avx2 and deep"
FILES = [f"test_cpu_{name}.py" for name in ("block", "vit", "choice", "selector", "spvit")]
# What depends on the products, not again for what differs elsewhere.
AMX = "amx and bfloat16 and not (thrice_argmax or reg4 or fc_norm)"
NOT_BY_DEFAULT = """
from slimvit import _extensions
module = _extensions.load("_cpu")
assert module.instruction_sets()[-1] == "amx" and module.chosen() == module.instruction_sets()[-2]
"""
OVERRUN = """
import torch
from slimvit import _extensions
from slimvit.backends import cpu
pack = cpu.pack_head(None, [(torch.ones(7, 48), None)], torch.float32, width=64)
"""


@pytest.fixture(scope="module")
def watched() -> None:
    """The watched module is built; a minute the first time."""
    if (reason := sanitized.why_not()) is not None:
        pytest.skip(reason)
    try:
        sanitized.build()
    except subprocess.CalledProcessError as error:
        pytest.fail(error.output)


@pytest.mark.usefixtures("watched")
def test_kernels():
    done = run(
        sanitized.command([*FILES, "-k", f"{BLOCK} or {NETWORK} or {CHOICE} or {SELECTION}"])
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.usefixtures("watched")
def test_amx():
    if "avx512" not in _extensions.load("_cpu").instruction_sets():
        pytest.skip("AMX is emulated with AVX-512, which this processor has not")
    done = run(sanitized.command([*FILES, "test_dynamic_vit.py", "-k", AMX]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout
    done = run([sys.executable, "-c", NOT_BY_DEFAULT])
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("watched")
def test_a_read_beyond_the_end_is_caught():
    """Weights [7, 48] that are packed as [7, 64]."""
    done = run([sys.executable, "-c", OVERRUN])
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer: heap-buffer-overflow" in done.stderr


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    folder = sanitized.ROOT / "tests"
    return subprocess.run(
        command, cwd=folder, env=sanitized.environment(), capture_output=True, text=True
    )


class TestAnotherModule:
    """$SLIMVIT_CPU_MODULE, by which the watched one takes the place of slimvit._cpu."""

    @pytest.fixture(autouse=True)
    def restored(self):
        before = sys.modules.get("slimvit._cpu")
        yield
        sys.modules.pop("slimvit._cpu", None)
        if before is not None:
            sys.modules["slimvit._cpu"] = before

    def test_is_loaded(self, monkeypatch, tmp_path):
        (tmp_path / "other.py").write_text("sanitized = 'other'\n")
        monkeypatch.setenv("SLIMVIT_CPU_MODULE", str(tmp_path / "other.py"))
        assert _extensions._attempt.__wrapped__("_cpu").sanitized == "other"

    @pytest.mark.parametrize("name", ["none.so", "none"])
    def test_that_cannot_be_loaded(self, monkeypatch, tmp_path, name):
        monkeypatch.setenv("SLIMVIT_CPU_MODULE", str(tmp_path / name))
        reason = _extensions._attempt.__wrapped__("_cpu")
        assert reason.startswith("slimvit._cpu cannot be imported: ")
        assert name in reason

    def test_is_not_the_default(self):
        if (reason := _extensions.why_not("_cpu")) is not None:
            pytest.skip(reason)
        assert not _extensions.load("_cpu").sanitized
