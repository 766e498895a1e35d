"""Builds of the compiled modules that only tests use; none replaces a module in slimvit/."""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def why_not() -> str | None:
    """Why nothing can be built here, or None if it can."""
    for program in ("g++", "cmake"):
        if find(program) is None:
            return f"{program} was not found"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


def find(program: str) -> str | None:
    """The program on PATH, or beside this Python, whose environment may not be activated."""
    return shutil.which(program) or shutil.which(program, path=sysconfig.get_path("scripts"))


def build(folder: Path, module: str, **options: str) -> None:
    """Build what has changed since the last time; raises CalledProcessError, with the output.

    `module` is one of CMake's SLIMVIT_MODULES, and the options are CMake's as well.
    """
    import pybind11

    options = {
        "SLIMVIT_MODULES": module,
        "SLIMVIT_WERROR": "ON",
        "CMAKE_BUILD_TYPE": "None",
        "CMAKE_CXX_COMPILER": find("g++"),
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(folder),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        **options,
    }
    if ninja := find("ninja"):
        options["CMAKE_MAKE_PROGRAM"] = ninja
    defines = [f"-D{name}={value}" for name, value in options.items()]
    generator = ["-G", "Ninja"] if ninja else []
    cmake = find("cmake")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of tests that run side by side
        for command in (
            [cmake, "-S", str(ROOT), "-B", str(folder), *generator, *defines],
            [cmake, "--build", str(folder), "--parallel", "2"],
        ):
            subprocess.run(
                command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
