"""What compilers made of the CUDA kernels: registers, memory, instructions, from their cubins."""

from __future__ import annotations

import importlib.util
import re
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# The low 12 bits of an instruction say which it is. There is no tool for the matrix instructions
# of sm_70 in CUDA 13; those of sm_75 on are checked against a disassembler in test_cuda_compiled.
OPCODES = {0x236: "HMMA.884", 0x23C: "HMMA", 0xFAE: "LDGSTS", 0x83B: "LDSM"}
_INSTRUCTION = 16  # bytes, from sm_70 on


class Kernel(NamedTuple):
    """`name` is that of the function and of its template's arguments; bytes are of a thread.

    `code` counts the instructions of OPCODES, and has their total as "all".
    """

    name: str
    arch: int
    registers: int
    spilled: int
    shared: int
    code: Counter

    def __str__(self) -> str:
        return f"{self.name} sm_{self.arch}: {self.registers} registers, {self.spilled} B spilled"


def why_not() -> str | None:
    """Why cubins cannot be read here, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton, whose cuobjdump reads them, is not installed"
    return None if tool("cuobjdump").is_file() else "triton's wheel has no cuobjdump here"


def tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin" / name


def run(*command: str | Path, folder: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return done.stdout


def cubins(module: Path, folder: Path) -> list[tuple[Path, int]]:
    """Of a compiled module, put into a folder, and for which architecture each is."""
    run(tool("cuobjdump"), "-xelf", "all", module, folder=folder)
    found = sorted(folder.glob("*.cubin"))
    return [(path, int(re.search(r"sm_(\d+)", path.name)[1])) for path in found]


def kernels(cubin: Path, arch: int) -> Iterator[Kernel]:
    usage, code = run(tool("cuobjdump"), "-res-usage", cubin), dict(_texts(cubin.read_bytes()))
    fields = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for name, *numbers in re.findall(fields, usage):
        registers, stack, shared, local = map(int, numbers)
        yield Kernel(short(name), arch, registers, stack + local, shared, _count(code[name]))


def short(name: str) -> str:
    """`slim_linear Volta 32` of what C++ makes of slim_linear_kernel<Volta, 32>."""
    found = re.search(r"\d+([a-z_]+)_kernel(?:I(.*?)E+v)?", name)
    if found is None:
        return name
    types = re.findall(r"Volta|__half|__nv_bfloat16|Li\d+", found[2] or "")
    return " ".join([found[1], *(part.removeprefix("Li") for part in types)])


def _texts(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Machine code of the functions in an ELF file, by their names."""
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    sections = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    for name, _, _, _, start, length in sections:
        at = sections[names][4] + name
        text = data[at : data.index(b"\0", at)].decode()
        if text.startswith(".text."):
            yield text.removeprefix(".text."), data[start : start + length]


def _count(code: bytes) -> Counter:
    found = Counter(all=len(code) // _INSTRUCTION)
    for at in range(0, len(code), _INSTRUCTION):
        opcode = int.from_bytes(code[at : at + 2], "little") & 0xFFF
        if opcode in OPCODES:
            found[OPCODES[opcode]] += 1
    return found
