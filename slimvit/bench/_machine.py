"""What a measurement is worth nothing without: the device, the versions, the commit."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

import torch

import slimvit
from slimvit.backends import cpu
from slimvit.doctor import processor_name

PACKAGES = ("torch", "timm", "onnxruntime", "openvino")


def device_name(device: torch.device) -> str:
    """The processor's or the GPU's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def peaks(device: torch.device, threads: int) -> dict[str, float]:
    """Measured GFLOP/s of a processor's threads at products, by precision; {} for other devices."""
    if device.type != "cpu" or cpu.why_not(device, torch.float32) is not None:
        return {}
    return {name: 1e-9 * threads * cpu.peak(dtype) for dtype, name in cpu.DTYPES.items()}


def versions() -> dict[str, str]:
    """Versions of slimvit and of the runtimes, "" for what is not installed."""
    found = {"slimvit": slimvit.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    return found


def commit() -> str:
    """Short hash of the checkout that slimvit runs from, with "+" if its files differ; else ""."""
    package = Path(slimvit.__file__).parent
    if _git(package, "ls-files", "__init__.py") != "__init__.py":
        return ""
    changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", ":/")
    return (_git(package, "rev-parse", "--short=12", "HEAD") or "") + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
