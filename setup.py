"""Build the compiled modules with CMake: `slimvit._cpu` always, `slimvit._cuda` where it can be.

SLIMVIT_CUDA=0 never builds `_cuda`, SLIMVIT_CUDA=1 insists on it. Unset, it is built where a CUDA
compiler is found, and where it is not, `_cuda.not_built.txt` tells `slimvit doctor` the reason.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
CUDA = os.environ.get("SLIMVIT_CUDA", "")
if CUDA not in ("", "0", "1"):
    sys.exit(f"SLIMVIT_CUDA must be 0, 1 or unset, got {CUDA!r}")


def program(name: str) -> str | None:
    """The program on PATH, or beside this Python, whose environment may not be activated."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def cuda_compiler() -> str:
    if CUDA == "0":
        raise CompileError("SLIMVIT_CUDA=0 was set when slimvit was built")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    named = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc"]
    for compiler in filter(None, [*named, "nvcc", "/usr/local/cuda/bin/nvcc"]):
        if found := shutil.which(compiler):
            return found
    raise CompileError(
        "no CUDA compiler was found when slimvit was built (CUDACXX, CUDA_HOME, CUDA_PATH, nvcc on "
        "PATH, /usr/local/cuda)"
    )


def run(*command: str, compiler: str = "") -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        first = next((i for i, line in enumerate(lines) if "error" in line.lower()), -5)
        reason = re.sub(r"^CMake Error at \S+ \(\w+\): ", "", " ".join(lines[first:][:5]))
        raise CompileError(f"cmake failed{compiler and f' with {compiler}'}: {reason}")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        note = self.note(ext, output.parent)
        note.unlink(missing_ok=True)
        try:
            self.cmake(ext.name.rpartition(".")[2], output.parent)
        except CompileError as error:
            if not ext.optional:
                raise
            output.unlink(missing_ok=True)  # of an earlier build
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"{error}\n")
            self.warn(f"{ext.name} is not built and slimvit works without it: {error}")

    def cmake(self, target: str, folder: Path) -> None:
        import pybind11

        # CMAKE_MAKE_PROGRAM each time: the cache of an earlier build holds its isolated, since
        # deleted ninja.
        cmake, ninja = program("cmake"), program("ninja")
        if cmake is None:
            raise CompileError("cmake was not found: pip install cmake")
        cuda = cuda_compiler() if target == "_cuda" else ""
        options = {
            "SLIMVIT_MODULES": target,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": folder,
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "CMAKE_CUDA_COMPILER": cuda,
        }
        defines = [f"-D{name}={value}" for name, value in options.items() if value]
        generator = ["-G", "Ninja"] if ninja else []
        extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        # CMake refuses or half forgets the cache of another tree or compiler: then start afresh.
        work = Path(self.build_temp).resolve() / target
        made_for, key = work / "made_for.txt", f"{ROOT}\n{cuda}\n"
        if not made_for.exists() or made_for.read_text() != key:
            shutil.rmtree(work, ignore_errors=True)
        run(cmake, "-S", str(ROOT), "-B", str(work), *generator, *defines, *extra, compiler=cuda)
        made_for.write_text(key)
        run(cmake, "--build", str(work), compiler=cuda)

    def copy_extensions_to_source(self) -> None:
        """In place, a module that was not built leaves its note, and no older module beside it."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            source = ROOT / "slimvit" / built.name
            note = self.note(ext, source.parent)
            note.unlink(missing_ok=True)
            if not built.exists():
                source.unlink(missing_ok=True)
                shutil.copy(self.note(ext, built.parent), note)

    @staticmethod
    def note(ext: Extension, folder: Path) -> Path:
        return folder / f"{ext.name.rpartition('.')[2]}.not_built.txt"


# Named so that a source distribution carries them.
sources = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*")) if path.is_file()]
setup(
    packages=[*find_packages(include=["slimvit", "slimvit.*"]), "slimvit.kernels"],
    package_dir={"slimvit.kernels": "kernels"},
    ext_modules=[
        Extension("slimvit._cpu", [], depends=["CMakeLists.txt", *sources]),
        Extension("slimvit._cuda", [], optional=CUDA != "1"),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
