"""Compiled modules and kernels: import them once, and keep the reason where that fails."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

NAMES = ("_cpu", "_cuda", "kernels")
_PACKAGE = Path(__file__).parent


def load(name: str) -> ModuleType | None:
    """The module `slimvit.<name>`, one of NAMES, or None where `why_not` has a reason."""
    module = _attempt(name)
    return None if isinstance(module, str) else module


def why_not(name: str) -> str | None:
    """Why `slimvit.<name>`, one of NAMES, cannot be imported here, in one line; None if it can."""
    module = _attempt(name)
    return module if isinstance(module, str) else None


@functools.cache
def _attempt(name: str) -> ModuleType | str:
    full_name = f"slimvit.{name}"
    try:
        # Before any module of ours that uses OpenMP, so that one libgomp and one pool serve both.
        import torch  # noqa: F401

        if other := os.environ.get(f"SLIMVIT{name.upper()}_MODULE"):  # SLIMVIT_CPU_MODULE
            return _from_file(full_name, Path(other))
        # `from slimvit import _cuda` would report a circular import instead of what is missing.
        return importlib.import_module(full_name)
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == full_name:
            return _from_checkout() if name == "kernels" else _not_built(name)
        return f"{full_name} cannot be imported: {' '.join(str(error).split())}"


def _not_built(name: str) -> str:
    note = _PACKAGE / f"{name}.not_built.txt"
    if note.exists():
        return f"slimvit.{name} is not built: {' '.join(note.read_text().split())}"
    others = sorted(path.name for path in _PACKAGE.glob(f"{name}.*.so"))
    if others:
        wanted = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        return f"slimvit.{name} is built for another Python: {others[0]}, not {wanted}"
    compiler = "CUDA" if name == "_cuda" else "C++"
    return f"slimvit.{name} is not built: install slimvit where there is a {compiler} compiler"


def _from_checkout() -> ModuleType | str:
    """In a checkout that is not installed, slimvit.kernels lies beside slimvit, as `kernels`."""
    folder = _PACKAGE.parent / "kernels"
    if not (folder / "__init__.py").exists():
        return f"slimvit.kernels is missing from {_PACKAGE} and from {folder}"
    try:
        return _from_file("slimvit.kernels", folder / "__init__.py")
    except ImportError as error:
        return f"slimvit.kernels cannot be imported: {' '.join(str(error).split())}"


def _from_file(full_name: str, path: Path) -> ModuleType:
    folder = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(
        full_name, path, submodule_search_locations=folder
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[full_name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError:
        del sys.modules[full_name]
        raise
    return module
