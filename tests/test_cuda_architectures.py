"""Which devices CUDA kernels are compiled for, by the compiler and TORCH_CUDA_ARCH_LIST."""

import os
import subprocess

import pytest
from builds import ROOT, find

pytestmark = pytest.mark.skipif(find("cmake") is None, reason="cmake was not found")
NEWEST = "75-real;80-real;86-real;89-real;90-real;100-real;120"


def architectures(wanted: str | None, compiler: str = "13.0") -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if "ARCH_LIST" not in name}
    if wanted is not None:
        environment["TORCH_CUDA_ARCH_LIST"] = wanted
    script = ROOT / "csrc" / "cuda" / "architectures.cmake"
    command = [find("cmake"), f"-DCMAKE_CUDA_COMPILER_VERSION={compiler}", "-P", str(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "wanted, compiler, found",
    [
        (None, "13.0", NEWEST),
        ("", "13.0", NEWEST),
        (" ; ", "13.0", NEWEST),
        (None, "12.9", f"70-real;{NEWEST}"),
        (None, "12.4", "70-real;75-real;80-real;86-real;89-real;90"),
        ("8.0;9.0a+PTX", "13.0", "80-real;90a"),
        ("8.0, 10.0f", "13.0", "80-real;100f-real"),
        ("5.2 6.0 6.1 7.0 8.0 9.0+PTX", "12.4", "70-real;80-real;90"),
    ],
)
def test_devices(wanted, compiler, found):
    done = architectures(wanted, compiler)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"-- CUDA architectures: {found}"


@pytest.mark.parametrize(
    "wanted, message",
    [
        ("Ampere", "must be a list of versions such as 8.0;9.0+PTX, got 'Ampere'"),
        ("5.2 6.1+PTX", "must name a device from 7.0 on, got '5.2 6.1+PTX'"),
    ],
)
def test_lists_that_name_no_device(wanted, message):
    done = architectures(wanted)
    assert done.returncode != 0 and message in " ".join(done.stderr.split())


def test_what_is_left_out_is_told():
    assert "No kernels for 6.1: it has no tensor cores" in architectures("6.1;8.0").stdout
