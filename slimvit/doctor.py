"""What works on this machine and why the rest does not: packages, processor, GPUs, back ends."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import sys
from pathlib import Path
from typing import Any

import slimvit
from slimvit import _extensions

_INSTALL = {
    "torch": "pip install torch",
    "timm": "pip install timm",
    "triton": "pip install triton, for the Triton kernels on GPUs",
    "onnx": "pip install 'slimvit[export]'",
    "onnxruntime": "pip install 'slimvit[export]'",
    "openvino": "pip install 'slimvit[export]'",
}
_GIB = 1024**3


def examine() -> dict[str, Any]:
    """Everything that decides what slimvit can do here, as plain values for JSON.

    Returns:
        `slimvit`, `python`, `system`: versions. `packages`: by name, `version` or None and
        `reason`. `processor`: `name`, `cores`, `threads` (of torch), `instruction_sets`, `uses`,
        `reason` (why it uses none), `bfloat16` (True where the processor has the instructions, None
        if unknown), `peaks` (floating-point operations per second of one thread's products, by
        dtype, as measured now: which precision is the faster one is not the same everywhere).
        `modules` and `gpus`: a `reason` where they do not work. `backends`: `name`, `device`,
        `precision` (what was asked for: float16 on GPUs, float32 on the CPU), `works`, `reason`.
        `auto`: the back end that "auto" takes on each device, None where there is none.
    """
    packages = {name: _package(name) for name in _INSTALL}
    gpus = _gpus()
    backends, auto = _backends(["cpu", *(f"cuda:{i}" for i in range(len(gpus["devices"])))])
    return {
        "slimvit": slimvit.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": packages,
        "processor": _processor(),
        "modules": {
            name: {"works": _extensions.why_not(name) is None, "reason": _extensions.why_not(name)}
            for name in _extensions.NAMES
        },
        "gpus": gpus,
        "backends": backends,
        "auto": auto,
    }


def verdict(report: dict[str, Any]) -> str:
    """The last line of the table: what "auto" takes on each device."""
    if not any(report["auto"].values()):
        reason = report["backends"][0]["reason"] if report["backends"] else "there is no back end"
        return f"nothing works here: {reason}"
    takes = (f"{backend or 'nothing'} on {device}" for device, backend in report["auto"].items())
    return f"auto takes {', '.join(takes)}"


def describe(report: dict[str, Any]) -> str:
    """A table of `examine()`'s report for people, its last line the verdict."""
    cpu = report["processor"]
    sections = {
        "packages": [
            (name, entry["version"] or f"no: {entry['reason']}")
            for name, entry in report["packages"].items()
        ],
        "processor": [
            ("name", cpu["name"]),
            ("cores", f"{cpu['cores']}, torch uses {cpu['threads'] or 'none'}"),
            ("instructions", _instructions(cpu)),
            ("bfloat16", _BFLOAT16[cpu["bfloat16"]]),
            ("products", _products(cpu["peaks"])),
        ],
        "modules": [
            (name, _state(entry) + (_built(report["gpus"]) if name == "_cuda" else ""))
            for name, entry in report["modules"].items()
        ],
        "GPUs": _gpu_rows(report["gpus"]),
    }
    for entry in report["backends"]:
        rows = sections.setdefault(f"back ends on {entry['device']}, {entry['precision']}", [])
        rows.append((entry["name"], _state(entry)))
    lines = [f"slimvit {report['slimvit']}, Python {report['python']}, {report['system']}"]
    for title, rows in sections.items():
        lines += ["", title, *(f"  {name:<12} {text}" for name, text in rows)]
    return "\n".join([*lines, "", verdict(report)])


_BFLOAT16 = {
    True: "in hardware",
    False: "not in hardware: the processor has no instructions for it",
    None: "unknown",
}


def _state(entry: dict[str, Any]) -> str:
    return "works" if entry["works"] else f"no: {entry['reason']}"


def _built(gpus: dict[str, Any]) -> str:
    architectures = " ".join(gpus["architectures"])
    return architectures and f", built with CUDA {gpus['runtime']} for {architectures}"


def _instructions(cpu: dict[str, Any]) -> str:
    if not cpu["uses"]:
        return f"no: {cpu['reason']}"
    others = [name for name in cpu["instruction_sets"] if name != cpu["uses"]]
    return cpu["uses"] + (f", also {', '.join(reversed(others))}" if others else "")


def _products(peaks: dict[str, float]) -> str:
    if not peaks:
        return "unknown"
    rates = ", ".join(f"{1e-9 * rate:.0f} in {dtype}" for dtype, rate in peaks.items())
    return f"{rates} GFLOP/s a thread at most, as measured now"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _package(name: str) -> dict[str, str | None]:
    # Imported, not only looked up: a broken install is the thing to find here.
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return {"version": None, "reason": f"missing ({_INSTALL[name]})"}
        return {"version": None, "reason": _one_line(error)}
    except Exception as error:
        return {"version": None, "reason": _one_line(error)}
    version = str(getattr(module, "__version__", "unknown"))
    return {"version": version.partition("-")[0], "reason": None}


# By machine, the instruction set that multiplies bfloat16.
_HAS_BFLOAT16 = dict.fromkeys(("x86_64", "AMD64"), "avx512_bf16")
_HAS_BFLOAT16 |= dict.fromkeys(("aarch64", "arm64"), "neon_bf16")


def _processor() -> dict[str, Any]:
    cpu = _extensions.load("_cpu")
    sets = cpu.instruction_sets() if cpu else []
    uses, reason, peaks = None, _extensions.why_not("_cpu"), {}
    if cpu:
        try:
            uses = cpu.chosen()
            peaks = {dtype: cpu.peak(dtype) for dtype in ("float32", "bfloat16")}
        except ValueError as error:  # SLIMVIT_ISA
            reason = str(error)
    torch = sys.modules.get("torch")
    native = _HAS_BFLOAT16.get(platform.machine())
    return {
        "name": processor_name(),
        "cores": _cores(),
        "threads": torch.get_num_threads() if torch else None,
        "instruction_sets": sets,
        "uses": uses,
        "reason": reason,
        "peaks": peaks,
        "bfloat16": native in sets if native and cpu else None,
    }


def processor_name() -> str:
    """The processor's own name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))  # what this process may use, not what there is
    return os.cpu_count() or 1


def _gpus() -> dict[str, Any]:
    """What torch sees, and whether kernels of `slimvit._cuda` run on it."""
    torch = sys.modules.get("torch")
    cuda = _extensions.load("_cuda")
    report: dict[str, Any] = {
        "driver": cuda.driver() if cuda else None,
        "runtime": cuda.runtime() if cuda else None,
        "architectures": cuda.architectures().split() if cuda else [],
        "devices": [],
        "reason": None,
    }
    if torch is None:
        report["reason"] = "torch cannot be imported"
    elif not torch.cuda.is_available():
        report["reason"] = _no_gpu(torch, cuda)
    else:
        report["devices"] = [_gpu(torch, cuda, i) for i in range(torch.cuda.device_count())]
    return report


def _no_gpu(torch: Any, cuda: Any) -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without GPU support"
    return (cuda.why_not() if cuda else None) or "torch sees no GPU"


def _gpu(torch: Any, cuda: Any, index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    reason = cuda.probe(index) if cuda else _extensions.why_not("_cuda")
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "memory": properties.total_memory,
        "works": reason is None,
        "reason": reason,
    }


def _gpu_rows(gpus: dict[str, Any]) -> list[tuple[str, str]]:
    if gpus["reason"]:
        return [("none", gpus["reason"])]
    rows = []
    for index, gpu in enumerate(gpus["devices"]):
        major, minor = gpu["capability"]
        text = f"{gpu['name']}, sm_{major}{minor}, {gpu['memory'] / _GIB:.0f} GiB"
        rows.append((f"cuda:{index}", text + ("" if gpu["works"] else f"; {gpu['reason']}")))
    return rows


def _backends(devices: list[str]) -> tuple[list[dict[str, Any]], dict[str, str | None]]:
    rows: list[dict[str, Any]] = []
    auto: dict[str, str | None] = {}
    try:
        import torch

        from slimvit import backends
    except Exception as error:
        row = {"name": "torch", "device": "cpu", "precision": "float32"}
        return [{**row, "works": False, "reason": _one_line(error)}], {}
    for device in devices:
        precision = "float32" if device == "cpu" else "float16"
        dtype = getattr(torch, precision)
        for name in backends.NAMES:
            reason = backends.why_not(name, torch.device(device), dtype)
            row = {"name": name, "device": device, "precision": precision}
            rows.append({**row, "works": reason is None, "reason": reason})
        auto[device] = _chosen(backends, torch.device(device), dtype)
    return rows, auto


def _chosen(backends: Any, device: Any, dtype: Any) -> str | None:
    from slimvit.errors import SlimvitError

    try:
        return backends.choose("auto", device, dtype)
    except SlimvitError:
        return None
