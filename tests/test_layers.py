"""Imports go one way, and foreign packages stay in their rooms."""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Upper layers first. A module may import its own room and rooms of lower layers.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("demo",),
    ("bench", "finetune"),
    ("search", "export", "evaluate", "doctor"),
    ("runtime",),
    ("dynamic",),
    ("macs",),
    ("models",),
    ("ops",),
    ("backends",),
    ("kernels", "_cpu", "_cuda", "_extensions"),
    ("data",),
    ("masks",),
    ("files", "images", "digests"),
    ("checks",),
    ("errors",),
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}

# timm's model classes are for slimvit/models alone; these rooms may use its helpers, and the demo
# makes its own small model by name.
HELPERS = r"timm\.(data|utils|optim|scheduler|loss)\b"
TIMM = {
    "models": r"timm\b",
    "data": HELPERS,
    "evaluate": HELPERS,
    "finetune": HELPERS,
    "demo": HELPERS + r"|timm(\.create_model)?$",
}
KERNEL_PACKAGES = {"slimvit", "torch", "triton", *sys.stdlib_module_names}


def test_imports_of_the_package():
    files = sorted((ROOT / "slimvit").rglob("*.py"))
    assert len(files) > 10
    assert [fault for file in files for fault in faults(file, file.read_text())] == []


def test_imports_of_the_kernels():
    files = sorted((ROOT / "kernels").rglob("*.py"))
    assert files
    assert [fault for file in files for fault in faults(file, file.read_text())] == []


def test_csrc_has_no_torch_header():
    files = [file for file in (ROOT / "csrc").rglob("*") if file.is_file()]
    assert {".h", ".cpp", ".cu"} <= {file.suffix for file in files}
    assert [fault for file in files for fault in torch_headers(file.name, file.read_text())] == []


@pytest.mark.parametrize(
    "file, source, fault",
    [
        ("slimvit/masks/_file.py", "import slimvit.macs", "masks imports macs"),
        ("slimvit/masks/_file.py", "from slimvit import prune", "masks imports search"),
        ("slimvit/models/slim.py", "from ..runtime import accelerate", "models imports runtime"),
        ("slimvit/models/slim.py", "from .. import runtime", "models imports runtime"),
        ("slimvit/ops/slim_block.py", "def f():\n from slimvit.models import x", "imports models"),
        ("slimvit/search/eq6.py", "from slimvit.bench import time", "search imports bench"),
        ("slimvit/bench/run.py", "import slimvit.cli.common", "bench imports cli"),
        ("slimvit/errors.py", "import slimvit.files", "errors imports files"),
        ("slimvit/data/__init__.py", "from slimvit import _cpu", "data imports _cpu"),
        (
            "slimvit/runtime/x.py",
            "import importlib; importlib.import_module('slimvit.demo')",
            "demo",
        ),
        ("slimvit/search/x.py", "from slimvit import export", "search imports export"),
        ("slimvit/shiny/x.py", "import torch", "shiny is in no layer"),
        ("slimvit/runtime/x.py", "import slimvit.shiny", "shiny is in no layer"),
        ("slimvit/runtime/x.py", "import timm", "timm"),
        ("slimvit/data/x.py", "from timm.models import VisionTransformer", "timm.models"),
        ("slimvit/data/x.py", "from timm import create_model", "timm"),
        ("slimvit/demo/x.py", "import timm.models", "timm.models"),
        ("slimvit/data/x.py", "from timm.database import x", "timm.database"),
        ("slimvit/cli/x.py", "from timm.layers import Attention", "timm.layers"),
        ("kernels/slim_attention.py", "import numpy", "numpy"),
        ("kernels/slim_attention.py", "import slimvit.ops", "kernels imports ops"),
        ("kernels/slim_attention.py", "from ..masks import Masks", "kernels imports masks"),
    ],
)
def test_the_checker_finds(file, source, fault):
    (found,) = faults(ROOT / file, source)
    assert fault in found
    assert file in found


@pytest.mark.parametrize(
    "file, source",
    [
        ("slimvit/cli/bench.py", "from slimvit.bench import bench; from slimvit.cli import common"),
        ("slimvit/cli/bench.py", "import slimvit; from . import common; import slimvit.demo"),
        (
            "slimvit/search/eq6.py",
            "from slimvit import Masks, accelerate; from slimvit import macs",
        ),
        ("slimvit/models/slim.py", "from timm.models.vision_transformer import VisionTransformer"),
        ("slimvit/data/x.py", "from timm.data import create_transform; from timm import data"),
        ("slimvit/demo/x.py", "import timm; from timm import create_model"),
        ("slimvit/doctor.py", "import importlib; importlib.import_module('onnx')"),
        ("kernels/slim_attention.py", "import math, torch, triton.language as tl"),
        ("kernels/slim_attention.py", "from . import tiles; import slimvit.kernels.tiles"),
    ],
)
def test_the_checker_lets_pass(file, source):
    assert faults(ROOT / file, source) == []


def test_the_checker_finds_torch_headers():
    assert torch_headers("a.cpp", "#include <vector>\n#include <ATen/ATen.h>\n") == [
        "a.cpp:2 includes ATen/ATen.h"
    ]
    assert torch_headers("a.cu", '# include "torch/extension.h"') != []
    assert torch_headers("a.h", '#include "cpu/torch_free.h"\n// #include <vector>') == []


def torch_headers(name: str, source: str) -> list[str]:
    """Includes of torch's headers in a C++ or CUDA source."""
    pattern = re.compile(r'^\s*#\s*include\s*[<"]((?:torch|ATen|c10|caffe2)/[^>"]*)')
    matches = ((i, pattern.match(line)) for i, line in enumerate(source.splitlines(), 1))
    return [f"{name}:{i} includes {match[1]}" for i, match in matches if match]


def module_name(file: Path) -> str:
    """slimvit/masks/_file.py -> slimvit.masks._file, kernels/a.py -> slimvit.kernels.a."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "slimvit" else ("slimvit", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def faults(file: Path, source: str) -> list[str]:
    """Imports in `source`, read as the module `file`, that the layers forbid."""
    importer = room_of(module_name(file))
    place = file.relative_to(ROOT)
    if importer and importer not in RANK:
        return [f"{place}: {importer} is in no layer of {Path(__file__).name}"]
    found = []
    for line, name in imports(file, source):
        fault = fault_of(importer, name)
        if fault:
            found.append(f"{place}:{line} {fault}")
    return found


def fault_of(importer: str, name: str) -> str | None:
    """Why a module of the room `importer` may not import `name`; None if it may."""
    package = name.partition(".")[0]
    if importer == "kernels" and package not in KERNEL_PACKAGES:
        return f"kernels imports {name}, which is neither torch nor triton"
    if package == "timm" and not re.match(TIMM.get(importer, r"(?!)"), name):
        return f"{importer} imports {name}: timm's models are for slimvit/models alone"
    if package != "slimvit":
        return None
    imported = room_of(name)
    if not imported or imported == importer:
        return None
    if imported not in RANK:
        return f"imports {name}: {imported} is in no layer of {Path(__file__).name}"
    lower = not importer or RANK[imported] > RANK[importer] and importer != "kernels"
    return None if lower else f"{importer} imports {imported}, which is not below it"


def room_of(name: str) -> str:
    """slimvit.masks._file -> masks; empty for slimvit itself and what it defines."""
    return ".".join(name.split(".")[1:2]).removeprefix("__version__")


def imports(file: Path, source: str) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of each import in `source`, wherever it stands."""
    package = module_name(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, full_name(base, alias.name)) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            found += [(node.lineno, str(name)) for name in names]
    return found


def full_name(base: str, name: str) -> str:
    """What `from base import name` reaches; the top level's names count as their home."""
    if base == "slimvit":
        return lazy_homes().get(name, f"slimvit.{name}")
    return f"{base}.{name}"


@functools.cache
def lazy_homes() -> dict[str, str]:
    """slimvit/__init__.py's table of the names that load on first use."""
    for node in ast.parse((ROOT / "slimvit" / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME":
            return ast.literal_eval(node.value)
    raise AssertionError("slimvit/__init__.py has no _HOME table")
