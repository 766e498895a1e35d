"""Every Triton kernel and configuration, compiled for GPUs that need not be here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no triton here: its kernels cannot be compiled")

from slimvit import _extensions

ROOT = Path(__file__).parent.parent
ARCHITECTURES = (80, 86, 90, 100)
MOST_SPILLED = 128  # bytes a thread: what waits for an epilogue, none of it inside a loop over K
WITHOUT_PRODUCTS = {
    "_absorb_importance",
    "_absorb_merge",
    "_absorb_select",
    "_package_tokens",
    "_row_stats",
    "_scatter_tokens",
    "_selector_choose",
    "_top_tokens",
}


@pytest.fixture(scope="module")
def configs():
    _extensions.load("kernels")
    return sys.modules["slimvit.kernels.configs"]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("compiled") / "report.json"
    command = [sys.executable, ROOT / "tests/compiled.py", "--json", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def name(row: dict) -> str:
    tile = {key: value for key, value in row["constants"].items() if key.startswith("BLOCK")}
    return f"{row['kernel']} sm_{row['arch']} {row['signature'].get('x')} {tile} {row['options']}"


def has_products(row: dict) -> bool:
    """Whether a kernel multiplies matrices of a type for which there are instructions."""
    half = {"*fp16", "*bf16"} & set(row["signature"].values())
    return row["kernel"] not in WITHOUT_PRODUCTS and bool(half)


def meant(row: dict) -> str:
    """The matrix instruction that a kernel should use: warp groups need tiles of 64 rows."""
    if row["constants"]["BLOCK_M"] < 64:
        return "mma.sync"
    return {90: "wgmma", 100: "tcgen05"}.get(row["arch"], "mma.sync")


def test_every_kernel_is_compiled_for_every_architecture(report):
    kernels = {
        "_absorb_importance",
        "_absorb_merge",
        "_absorb_scores",
        "_absorb_select",
        "_last_attention",
        "_package_tokens",
        "_patch_embedding",
        "_row_stats",
        "_scatter_tokens",
        "_selector_choose",
        "_selector_embed",
        "_selector_judge",
        "_slim_attention",
        "_slim_linear",
        "_slim_mlp",
        "_top_tokens",
    }
    compiled = {(row["kernel"], row["arch"]) for row in report["compiled"]}
    assert compiled == {(kernel, arch) for kernel in kernels for arch in ARCHITECTURES}


def test_every_entry_of_the_table_is_used(report, configs):
    unused = [entry for entry in configs.entries() if entry not in report["entries"]]
    assert unused == []


def test_shared_memory_fits(report, configs):
    limits = configs.SHARED_MEMORY
    assert [name(row) for row in report["compiled"] if row["shared"] > limits[row["arch"]]] == []


def test_registers_do_not_spill(report):
    spilled = {name(row): row["spilled"] for row in report["compiled"]}
    assert {key: value for key, value in spilled.items() if value > MOST_SPILLED} == {}


def test_the_matrix_instruction_meant_is_in_the_code(report):
    rows = [row for row in report["compiled"] if has_products(row)]
    assert len(rows) > 200
    assert [name(row) for row in rows if meant(row) not in row["matrix"]] == []


def test_gpus_that_no_entry_names(configs):
    """Unknown ones are taken for those that have the same instructions and no more memory."""
    known = {72: 80, 88: 80, 95: 90, 101: 100, 119: 100, 122: 86, 130: 86}
    assert {arch: configs.family(arch) for arch in known} == known
