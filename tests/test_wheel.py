"""What is distributed: a source distribution, and the wheel that it builds."""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import slimvit

ROOT = Path(__file__).parent.parent
PARTS = ("csrc", "kernels", "slimvit", "tests", "benchmarks")
LEFT_BEHIND = shutil.ignore_patterns("__pycache__", "*.so", "*.not_built.txt", "*.egg-info")


def build(kind: str, source: Path, output: Path) -> Path:
    """Build a `kind` of distribution, without the network, CUDA and the time to optimise."""
    code = f"from setuptools.build_meta import build_{kind} as b; b({str(output)!r})"
    env = {**os.environ, "SLIMVIT_CUDA": "0", "CMAKE_ARGS": "-DCMAKE_CXX_FLAGS_RELEASE=-O0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (built,) = output.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return built


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the checkout without what was built in it."""
    for module in ("setuptools", "wheel", "pybind11"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed, and a build without the network needs it")
    scripts = sysconfig.get_path("scripts")
    if not (shutil.which("cmake") or shutil.which("cmake", path=scripts)):
        pytest.skip("cmake is not installed, and a build without the network needs it")
    copy = tmp_path_factory.mktemp("source")
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, copy / part, ignore=LEFT_BEHIND)
    return copy


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built by one of the processes that the tests run in, for all of them."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    output = shared / "the_wheel"
    with open(shared / "the_wheel.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if built := list(output.glob("*.whl")):
            return built[0]
        folder = tmp_path_factory.mktemp("unpacked")
        with tarfile.open(sdist) as archive:
            archive.extractall(folder)
        (unpacked,) = folder.iterdir()
        return build("wheel", unpacked, output)


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def files(root: Path, folder: str, *patterns: str) -> set[str]:
    found = (path for pattern in patterns for path in (root / folder).rglob(pattern))
    return {str(path.relative_to(root)) for path in found if path.is_file()}


def test_the_source_distribution_can_build(source, sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"CMakeLists.txt", "LICENSE", "Makefile", "pyproject.toml", "setup.py"}
    needed |= files(source, "tests", "*") | files(source, "benchmarks", "*")
    needed |= files(source, "csrc", "*") | files(source, "kernels", "*.py", "*.json")
    assert needed - names == set()
    assert not any(name.endswith((".so", ".pyc", ".not_built.txt")) for name in names)


def test_the_wheel_is_of_this_version(wheel):
    assert wheel.name.startswith(f"slimvit-{slimvit.__version__}-cp")


def test_the_wheel_installs_slimvit_and_nothing_else(names):
    info = f"slimvit-{slimvit.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"slimvit", info}
    assert not any(Path(name).suffix in {".cpp", ".cu", ".h"} for name in names)


def test_the_wheel_holds_every_module_and_weight(source, names):
    assert files(source, "slimvit", "*.py", "*.safetensors", "py.typed") - names == set()
    kernels = {f"slimvit/{name}" for name in files(source, "kernels", "*.py", "*.json")}
    assert "slimvit/kernels/__init__.py" in kernels
    assert kernels - names == set()


def test_the_wheel_holds_one_binary_and_no_libgomp(names):
    binaries = [name for name in names if ".so" in Path(name).name]
    assert binaries == [f"slimvit/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"]


def test_the_wheel_says_why_cuda_is_not_built(wheel):
    note = zipfile.ZipFile(wheel).read("slimvit/_cuda.not_built.txt").decode()
    assert note == "SLIMVIT_CUDA=0 was set when slimvit was built\n"


@pytest.mark.triton
def test_the_wheel_works_where_it_is_unpacked(wheel, tmp_path, run_from):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    lines = run_from(
        tmp_path,
        "import slimvit, slimvit.kernels, slimvit._cpu\n"
        "from slimvit import _extensions\n"
        "print(slimvit.__file__)\n"
        "print(slimvit.kernels.__file__)\n"
        "print(*slimvit._cpu.instruction_sets()[:1])\n"
        "print(_extensions.why_not('_cuda'))\n",
    )
    package = tmp_path / "slimvit"
    assert lines == [
        f"{package}/__init__.py",
        f"{package}/kernels/__init__.py",
        "portable",
        "slimvit._cuda is not built: SLIMVIT_CUDA=0 was set when slimvit was built",
    ]


def test_a_wrong_switch_is_refused(source):
    env = {**os.environ, "SLIMVIT_CUDA": "yes"}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "SLIMVIT_CUDA must be 0, 1 or unset, got 'yes'"
