"""The doctor: what it finds, what it says, and that nothing broken stops it."""

import copy
import importlib
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from slimvit import _extensions, backends, doctor
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
        dtype = getattr(torch, entry["precision"])
        assert entry["precision"] == ("float32" if entry["device"] == "cpu" else "float16")
        assert entry["reason"] == backends.why_not(entry["name"], entry["device"], dtype)
    assert "cpu" in healthy["auto"]


def test_the_table(healthy):
    text = doctor.describe(healthy)
    assert text.startswith("slimvit ")
    assert text.splitlines()[-1] == doctor.verdict(healthy)
    assert doctor.verdict(healthy).startswith("auto takes ")
    assert rows(text, "packages")["torch"] == healthy["packages"]["torch"]["version"]
    assert rows(text, "back ends on cpu, float32")["torch"] == "works"
    assert rows(text, "processor")["instructions"].startswith(healthy["processor"]["uses"])


def test_how_fast_products_are(healthy):
    peaks = healthy["processor"]["peaks"]
    assert peaks.keys() == {"float32", "bfloat16"}
    assert all(1e9 < rate < 1e13 for rate in peaks.values())
    report = copy.deepcopy(healthy)
    report["processor"]["peaks"] = {"float32": 198.3e9, "bfloat16": 99.2e9}
    told = rows(doctor.describe(report), "processor")["products"]
    assert told.startswith("198 in float32, 99 in bfloat16 GFLOP/s a thread")


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
    assert rows(doctor.describe(doctor.examine()), "processor")["products"] == "unknown"


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


class TestCuda:
    """What is said of slimvit._cuda: no compiler, no GPU, an old driver, no code for a GPU."""

    # A driver of CUDA 11.2, as far as the runtime asks.
    DRIVER = """
    int cuInit(unsigned flags) { return 0; }
    int cuDriverGetVersion(int* version) { *version = 11020; return 0; }
    """

    def pretend(self, monkeypatch, module: SimpleNamespace | str) -> None:
        """A module, or the reason why there is none."""
        real = _extensions._attempt
        monkeypatch.setattr(
            _extensions, "_attempt", lambda name: module if name == "_cuda" else real(name)
        )
        monkeypatch.setattr(backends.cuda, "_RUN_ON", set())

    def module(self, **answers: object) -> SimpleNamespace:
        known = {"architectures": "75-real 80", "runtime": "13.0", "driver": None, **answers}
        return SimpleNamespace(
            **{name: lambda *_, answer=answer: answer for name, answer in known.items()}
        )

    def gpu(self, monkeypatch, major: int, minor: int) -> None:
        found = SimpleNamespace(name="Tesla", major=major, minor=minor, total_memory=16 * 1024**3)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: found.name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: found)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, minor))

    def test_no_compiler(self, monkeypatch):
        reason = "slimvit._cuda is not built: no CUDA compiler was found when slimvit was built"
        self.pretend(monkeypatch, reason)
        self.gpu(monkeypatch, 8, 0)
        text = doctor.describe(doctor.examine())
        assert rows(text, "modules")["_cuda"] == f"no: {reason}"
        assert rows(text, "GPUs")["cuda:0"] == f"Tesla, sm_80, 16 GiB; {reason}"
        assert rows(text, "back ends on cuda:0, float16")["cuda"] == f"no: {reason}"

    @pytest.mark.triton
    def test_no_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        self.pretend(monkeypatch, self.module(why_not="no NVIDIA driver is installed"))
        report = doctor.examine()
        text = doctor.describe(report)
        assert rows(text, "modules")["_cuda"] == "works, built with CUDA 13.0 for 75-real 80"
        assert rows(text, "GPUs") == {"none": "no NVIDIA driver is installed"}
        assert report["gpus"]["architectures"] == ["75-real", "80"]

    def test_no_code_for_the_gpu(self, monkeypatch):
        failure = "no kernel image is available (cudaErrorNoKernelImageForDevice)"
        self.pretend(monkeypatch, self.module(why_not=None, probe=failure))
        self.gpu(monkeypatch, 7, 0)
        text = doctor.describe(doctor.examine())
        found = rows(text, "back ends on cuda:0, float16")
        assert found["cuda"].startswith("no: it was built without code for sm_70 (75-real 80): ")
        assert "build slimvit with CUDA 12" in found["cuda"]
        assert found["triton"].startswith("no: ") and found["torch"] == "works"
        assert text.endswith("torch on cuda:0")

    def test_a_gpu_that_works(self, monkeypatch):
        self.pretend(monkeypatch, self.module(why_not=None, probe=None))
        self.gpu(monkeypatch, 7, 5)
        text = doctor.describe(doctor.examine())
        assert rows(text, "back ends on cuda:0, float16")["cuda"] == "works"
        assert text.endswith("cuda on cuda:0")

    def test_an_old_driver(self, tmp_path):
        """Of a real module, before a driver that serves too old a CUDA."""
        if (reason := _extensions.why_not("_cuda")) is not None:
            pytest.skip(reason)
        if shutil.which("gcc") is None:
            pytest.skip("gcc was not found")
        runtime = _extensions.load("_cuda").runtime()
        command = ["gcc", "-shared", "-fPIC", "-xc", "-", "-o", tmp_path / "libcuda.so.1"]
        subprocess.run(command, input=self.DRIVER, text=True, check=True)
        code = "from slimvit import _extensions; print(_extensions.load('_cuda').why_not())"
        paths = f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "LD_LIBRARY_PATH": paths},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == (
            f"the NVIDIA driver serves CUDA 11.2 and slimvit._cuda is built with {runtime}: "
            "update the driver, or build slimvit with an older CUDA"
        )


def test_verdict_names_each_device(healthy):
    report = {**healthy, "auto": {"cpu": "torch", "cuda:0": "triton", "cuda:1": None}}
    assert doctor.verdict(report) == "auto takes torch on cpu, triton on cuda:0, nothing on cuda:1"


def test_the_command_writes_json(tmp_path, capsys, healthy):
    assert main(["doctor", "--json", str(tmp_path / "report.json")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == doctor.verdict(healthy)
    report = json.loads((tmp_path / "report.json").read_text())
    wanted = copy.deepcopy(healthy)
    for processor in (report["processor"], wanted["processor"]):
        assert processor.pop("peaks").keys() == {"float32", "bfloat16"}  # measured by each
    assert report == wanted


def test_a_folder_that_is_missing_is_one_clear_line(tmp_path, capsys):
    assert main(["doctor", "--json", str(tmp_path / "none" / "report.json")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "none" in error
