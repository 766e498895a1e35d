"""Compiled modules and kernels: import them once, and keep the reason where that fails."""

from __future__ import annotations

import functools
import importlib
import importlib.util
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
    return f"slimvit.{name} is not built: install slimvit where there is a C++ compiler"


def _from_checkout() -> ModuleType | str:
    """In a checkout that is not installed, slimvit.kernels lies beside slimvit, as `kernels`."""
    folder = _PACKAGE.parent / "kernels"
    if not (folder / "__init__.py").exists():
        return f"slimvit.kernels is missing from {_PACKAGE} and from {folder}"
    spec = importlib.util.spec_from_file_location(
        "slimvit.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        del sys.modules[spec.name]
        return f"slimvit.kernels cannot be imported: {' '.join(str(error).split())}"
    return module
