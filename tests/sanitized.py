"""Test the C++ kernels while AddressSanitizer and UBSan watch: python tests/sanitized.py [ARGS].

The build lies in build/sanitized and never replaces the module in slimvit/. Unoptimised, since it
takes a quarter of the time to build and leaves no undefined behaviour for the compiler to drop.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import builds

ROOT = builds.ROOT
BUILD = ROOT / "build" / "sanitized"
MODULE = BUILD / f"_cpu{builds.SUFFIX}"
# Freed memory waits in quarantine there, so that memory does grow.
TESTS = [
    "test_cpu_block.py",
    "test_cpu_extremes.py",
    "test_cpu_vit.py",
    "test_slim_vit.py",
    "test_cpu_choice.py",
    "test_cpu_choice_order.py",
    "test_dynamic_vit.py",
    "test_cpu_selector.py",
    "test_cpu_spvit.py",
    "-k",
    "not memory_does_not_grow",
]
RUN = """
import sys, pytest
from slimvit import _extensions
module = _extensions.load("_cpu")
assert module is not None, _extensions.why_not("_cpu")
assert module.sanitized and module.__file__ == sys.argv[1], module
sys.exit(pytest.main(sys.argv[2:]))
"""


def why_not() -> str | None:
    """Why the kernels cannot be built or watched here, or None if they can."""
    if (reason := builds.why_not()) is not None:
        return reason
    for name, path in libraries().items():
        if not path.is_file():
            return f"g++ has no {name}"
    return None


def libraries() -> dict[str, Path]:
    def path(name: str) -> Path:
        command = [builds.find("g++"), f"-print-file-name={name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return Path(done.stdout.strip())  # the name alone where there is none

    return {name: path(name) for name in ("libasan.so", "libubsan.so")}


def build() -> None:
    """Build what has changed since the last time; raises CalledProcessError, with the output."""
    builds.build(BUILD, "_cpu", SLIMVIT_SANITIZE="ON")


def environment() -> dict[str, str]:
    """In which Python has the watched module for slimvit._cpu."""
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(str(path) for path in libraries().values()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little when it ends
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "SLIMVIT_CPU_MODULE": str(MODULE),
    }


def command(arguments: list[str]) -> list[str]:
    """A pytest run that is only begun with the watched module, and leaves its reports alone."""
    return [sys.executable, "-c", RUN, str(MODULE), "-q", "--capture=sys", *arguments]


def main() -> int:
    if (reason := why_not()) is not None:
        print(f"the kernels cannot be watched here: {reason}", file=sys.stderr)
        return 1
    try:
        build()
    except subprocess.CalledProcessError as error:
        print(error.output, file=sys.stderr)
        return error.returncode
    arguments = sys.argv[1:] or TESTS
    return subprocess.run(command(arguments), cwd=ROOT / "tests", env=environment()).returncode


if __name__ == "__main__":
    sys.exit(main())
