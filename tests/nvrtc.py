"""CUDA 12's compiler of device code, from its wheels: it still compiles for sm_70."""

from __future__ import annotations

import ctypes
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARY = ("nvidia-cuda-nvrtc-cu12", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12")
HEADERS = [
    ("nvidia-cuda-runtime-cu12", "nvidia/cuda_runtime/include"),
    ("nvidia-cuda-nvcc-cu12", "nvidia/cuda_nvcc/include"),
]
# Of the standard library, what the kernels use: there is no host compiler to take it from.
STANDARD = {
    "cstdint": "namespace std { using int64_t = long long; }",
    "cstring": "",
    "stdexcept": "",
    "string": "",
    "type_traits": """#pragma once
namespace std {
template <class A, class B> struct is_same { static constexpr bool value = false; };
template <class A> struct is_same<A, A> { static constexpr bool value = true; };
}""",
}


def why_not() -> str | None:
    """Why it cannot be used here, or None if it can."""
    for package, path in [LIBRARY, *HEADERS]:
        if not _find(package, path):
            return f"{package} is not installed"
    return None


def _find(package: str, path: str) -> Path | None:
    try:
        found = Path(metadata.distribution(package).locate_file(path))
    except metadata.PackageNotFoundError:
        return None
    return found if found.exists() else None


def compile_for(arch: int, source: Path) -> bytes:
    """The cubin of a .cu file's kernels; raises RuntimeError with what the compiler says."""
    library = ctypes.CDLL(str(_find(*LIBRARY)))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    headers = _strings(STANDARD.values()), _strings(STANDARD)
    text = source.read_bytes(), source.name.encode()
    library.nvrtcCreateProgram(ctypes.byref(program), *text, len(STANDARD), *headers)
    options = [f"-I{_find(*header)}" for header in HEADERS]
    # What runs on the host counts as device code, so that launchers say which kernels there are.
    options += [f"-arch=sm_{arch}", "-std=c++17", "-default-device", f"-I{ROOT / 'csrc'}"]
    failed = library.nvrtcCompileProgram(program, len(options), _strings(options))
    kind = "ProgramLog" if failed else "CUBIN"
    getattr(library, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    answer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{kind}")(program, answer)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise RuntimeError(answer.value.decode())
    return answer.raw


def _strings(values) -> ctypes.Array:
    values = [value.encode() for value in values]
    return (ctypes.c_char_p * len(values))(*values)
