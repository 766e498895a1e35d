"""The doctor: what it finds, what it says, and that nothing broken stops it."""

import copy
import importlib
import json
import sys

import pytest

from slimvit import backends, doctor
from slimvit.cli import main


@pytest.fixture(scope="module")
def healthy():
    return doctor.examine()


def rows(text: str, section: str) -> dict[str, str]:
    """Rows of a section of the table, by their first word."""
    block = text.split(f"\n\n{section}\n")[1].split("\n\n")[0]
    return dict(line.split(maxsplit=1) for line in block.splitlines())


def test_every_back_end_is_examined(healthy):
    on_cpu = [entry for entry in healthy["backends"] if entry["device"] == "cpu"]
    assert [entry["name"] for entry in on_cpu] == list(backends.NAMES)
    for entry in healthy["backends"]:
        assert entry["works"] == (entry["reason"] is None)
        assert entry["reason"] == backends.why_not(entry["name"], entry["device"])
    assert "cpu" in healthy["auto"]


def test_the_table(healthy):
    text = doctor.describe(healthy)
    assert text.startswith("slimvit ")
    assert text.splitlines()[-1] == doctor.verdict(healthy)
    assert doctor.verdict(healthy).startswith("auto takes ")
    assert rows(text, "packages")["torch"] == healthy["packages"]["torch"]["version"]
    assert rows(text, "back ends on cpu")["torch"] == "works"
    assert rows(text, "processor")["instructions"].startswith(healthy["processor"]["uses"])


def test_a_missing_package_has_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    report = doctor.examine()
    assert report["packages"]["openvino"]["version"] is None
    line = rows(doctor.describe(report), "packages")["openvino"]
    assert line == "no: missing (pip install 'slimvit[export]')"


def test_a_broken_package_has_its_reason(monkeypatch):
    real_import = importlib.import_module

    def broken(name, *rest):
        if name == "timm":
            raise RuntimeError("operator torchvision::nms\ndoes not exist")
        return real_import(name, *rest)

    monkeypatch.setattr(importlib, "import_module", broken)
    line = rows(doctor.describe(doctor.examine()), "packages")["timm"]
    assert line == "no: RuntimeError: operator torchvision::nms does not exist"


def test_a_wrong_instruction_set_is_told(monkeypatch):
    monkeypatch.setenv("SLIMVIT_ISA", "sse9")
    line = rows(doctor.describe(doctor.examine()), "processor")["instructions"]
    assert line.startswith("no: SLIMVIT_ISA must be one of")


def test_without_torch_nothing_works(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("nothing works here: ModuleNotFoundError")
    assert rows(out, "packages")["torch"] == "no: missing (pip install torch)"
    assert rows(out, "GPUs")["none"] == "torch cannot be imported"


def test_gpus_are_listed(healthy):
    report = copy.deepcopy(healthy)
    gpu = {"name": "NVIDIA H200", "capability": [9, 0], "memory": 140 * 1024**3}
    report["gpus"]["reason"] = None
    report["gpus"]["devices"] = [
        {**gpu, "works": True, "reason": None},
        {**gpu, "works": False, "reason": "no kernel image is available"},
    ]
    found = rows(doctor.describe(report), "GPUs")
    assert found["cuda:0"] == "NVIDIA H200, sm_90, 140 GiB"
    assert found["cuda:1"] == "NVIDIA H200, sm_90, 140 GiB; no kernel image is available"


def test_verdict_names_each_device(healthy):
    report = {**healthy, "auto": {"cpu": "torch", "cuda:0": "triton", "cuda:1": None}}
    assert doctor.verdict(report) == "auto takes torch on cpu, triton on cuda:0, nothing on cuda:1"


def test_the_command_writes_json(tmp_path, capsys, healthy):
    assert main(["doctor", "--json", str(tmp_path / "report.json")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == doctor.verdict(healthy)
    assert json.loads((tmp_path / "report.json").read_text()) == healthy


def test_a_folder_that_is_missing_is_one_clear_line(tmp_path, capsys):
    assert main(["doctor", "--json", str(tmp_path / "none" / "report.json")]) in (1, 2)
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "none" in error
