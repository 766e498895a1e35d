"""Compile every Triton kernel that slimvit's models launch, for GPUs that need not be here.

    python tests/compiled.py --arch 80 90 --json report.json

The kernels' own launchers run on tensors without data; what they would launch is recorded and
compiled for each architecture. The report has, for each kernel: registers, bytes spilled, shared
memory and which matrix instructions are in the code.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from slimvit import _extensions

kernels = _extensions.load("kernels")
assert kernels is not None, _extensions.why_not("kernels")
configs = sys.modules["slimvit.kernels.configs"]
# width, heads, alive and kept tokens of some blocks
SHAPES = {
    "Ti": (192, 3, [(197, 141), (111, 111), (40, 20)]),
    "S": (384, 6, [(197, 141), (131, 121)]),
    "B": (768, 12, [(197, 197), (577, 257)]),
}
# head size, alive tokens: of patches of 14 pixels, of wide heads, and as many as stay on the chip
ATTENTION = [
    (32, 224),
    (64, 224),
    (64, 225),
    (64, 257),
    (72, 257),
    (80, 128),
    (80, 257),
    (128, 400),
]
# bfloat16 is float16's code but for the type of the operands, and float32 has matrix instructions
# nowhere: once is enough for each.
DTYPES = {80: (torch.float16, torch.float32), 90: (torch.float16, torch.bfloat16)}
MATRIX = {"mma.sync": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
TYPES |= {torch.int64: "i64", torch.int32: "i32"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 86, 90, 100])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    used: list[dict[str, Any]] = []
    launches = [launch for arch in args.arch for launch in record(arch, used)]
    with ProcessPoolExecutor(args.jobs) as pool:
        compiled = list(pool.map(compile_launch, launches, chunksize=4))
    text = json.dumps({"compiled": compiled, "entries": used}, indent=1)
    if args.json:
        args.json.write_text(text)
    else:
        print(text)


def record(arch: int, used: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a forward pass of each shape, precision and batch launches on an architecture.

    The entries of the table that were read for it go into `used`.
    """

    def find(*key: Any) -> dict[str, Any]:
        entry = original_find(*key)
        if entry not in used:
            used.append(entry)
        return entry

    found: dict[str, dict[str, Any]] = {}

    def run(fn: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launch = specialise(fn, args, options) | {"arch": arch, "grid": list(grid)}
        key = json.dumps([launch[k] for k in ("kernel", "signature", "constants", "options")])
        found.setdefault(key, launch)

    original, JITFunction.run = JITFunction.run, run
    original_find, configs.find = configs.find, find
    configs.lookup.cache_clear()
    for name, module in sys.modules.items():
        if name.startswith("slimvit.kernels") and hasattr(module, "architecture"):
            module.architecture = lambda device: arch
    try:
        for dtype in DTYPES.get(arch, (torch.float16,)):
            for width, heads, lengths in SHAPES.values():
                for batch in (1, 16, 256):
                    for m, n in lengths:
                        launch_block(dtype, batch, m, n, width, heads)
                        if n < m:
                            launch_choice(dtype, batch, m, n, width, heads)
                            launch_selector(dtype, batch, m, n, width, heads)
                    launch_ends(dtype, batch, 197, 111, width, heads)
            for d, m in ATTENTION:
                launch_attention(empty(dtype, 64, m - 50, 2 * d), empty(dtype, 64, m, 4 * d), 2)
    finally:
        JITFunction.run, configs.find = original, original_find
    return list(found.values())


def launch_block(dtype: torch.dtype, batch: int, m: int, n: int, width: int, heads: int) -> None:
    x, stats = empty(dtype, batch, m, width), empty(torch.float32, batch, m, 1, 2)
    wide, narrow = matrix(dtype, 3 * width, width), matrix(dtype, width, width)
    eps = {"eps": 1e-6}
    q, kv = kernels.slim_qkv(x, stats, wide[0], wide[1], wide[1], n, width, **eps)
    index = empty(torch.int64, batch, n)
    kernels.slim_qkv(x, stats, wide[0], wide[1], wide[1], n, width, **eps, index=index)
    a = launch_attention(q, kv, heads)
    up, down = matrix(dtype, 4 * width, width), matrix(dtype, width, 4 * width)
    second_half(a, x, narrow, up, down)


def launch_attention(q: torch.Tensor, kv: torch.Tensor, heads: int) -> torch.Tensor:
    batch, m, twice = kv.shape
    kernels.slim_attention(q, kv, heads, key_bias=empty(torch.float32, batch, m))
    kernels.slim_attention(q, kv, heads, extra=empty(torch.float32, twice), extra_bias=1.0)
    return kernels.slim_attention(q, kv, heads)


def launch_choice(dtype: torch.dtype, batch: int, m: int, n: int, width: int, heads: int) -> None:
    """What a block launches that chooses its tokens, and merges them, for each image."""
    x = empty(dtype, batch, m, width)
    stats = kernels.row_stats(x)
    kv, norm = empty(dtype, batch, m, 2 * width), empty(torch.float32, width)
    for tokens in (1, 2):
        q = empty(dtype, batch, tokens, width)
        size = empty(torch.float32, batch, m) if tokens == 1 else None
        importance, score, cosine = kernels.absorb_scores(
            x, stats, q, kv, heads, tokens, m - tokens, norm, norm, eps=1e-6, key_bias=size
        )
        index, into = kernels.absorb_select(score, cosine, n, tokens)
        merged, *_, spread = kernels.absorb_merge(
            x, stats, importance, index, into, size=size, spread=size
        )
        up, down = matrix(dtype, 4 * width, width), matrix(dtype, width, 4 * width)
        second_half(merged, merged, matrix(dtype, width, width), up, down, spread)
    kernels.top_tokens(score, n, 1)
    channels = max(1, round(width / 64)) * 16
    hidden = empty(dtype, batch, m, channels)
    kernels.top_tokens(hidden, n, 1, weight=empty(torch.float32, channels))


def launch_selector(dtype: torch.dtype, batch: int, m: int, n: int, width: int, heads: int) -> None:
    """What a selector launches ahead of a block that receives n tokens of m."""
    x, c, hidden = empty(dtype, batch, m, width), width // heads, max(1, heads // 2)
    embed, embed_bias = empty(dtype, heads, c, c), empty(torch.float32, heads, c)
    judge1, bias1 = empty(dtype, heads, c, c // 2), empty(torch.float32, heads, c // 2)
    judge2, bias2 = empty(dtype, heads, c // 2, c // 4), empty(torch.float32, heads, c // 4)
    weigh1, weigh2 = empty(torch.float32, hidden, heads), empty(torch.float32, heads, hidden)
    others = {"prefix": 1, "packages": 1}
    verdict, weight = kernels.selector_judge(
        *(x, embed, embed_bias, judge1, bias1, judge2, bias2, bias2, weigh2[:, 0]),
        *(weigh1, weigh1[:, 0], weigh2, weigh2[:, 0]),
        **others,
        eps=1e-6,
    )
    _, share, index = kernels.selector_choose(verdict, weight, n - 3, **others)
    kernels.package_tokens(x, index, share, 1)


def second_half(a: Any, x: Any, proj: Any, up: Any, down: Any, spread: Any = None) -> None:
    squares = None if spread is None else up[1]
    act = {"eps": 1e-6, "activation": "gelu", "spread": spread, "squares": squares}
    if kernels.halves(x.shape[2]):
        kernels.slim_mlp(a, x, proj, up, down, **act)
        return
    y, stats = kernels.slim_linear(a, *proj, stage="proj", residual=x, emit=True)
    h, _ = kernels.slim_linear(y, *up, stage="fc1", stats=stats, row_sums=up[1], **act)
    kernels.slim_linear(h, *down, stage="fc2", residual=y, emit=True)


def launch_ends(
    dtype: torch.dtype, batch: int, tokens: int, m: int, width: int, heads: int
) -> None:
    """The embedding, the last block and the scatter."""
    images = empty(dtype, batch, 3, 224, 224)
    table, order = empty(torch.float32, tokens, width), empty(torch.int64, tokens)
    patch = empty(dtype, width, 3, 16, 16)
    kernels.patch_embedding(images, patch, table, order, 1)
    kernels.patch_embedding(images.float(), patch, table, order, 1)  # as users have them
    x = empty(dtype, batch, m, width)
    stats, d = kernels.row_stats(x), width // heads
    kernels.scatter_tokens(x, order[:m], tokens)
    if width * dtype.itemsize > 1536:  # too wide a row for the kernel: see ops/fused_vit.py
        return
    q, _ = kernels.slim_linear(
        x, *matrix(dtype, width, width), n=1, stats=stats, row_sums=table[0], eps=1e-6
    )
    u, _ = kernels.slim_linear(q, empty(dtype, heads * width, d), None, groups=heads)
    z = kernels.last_attention(x, stats, u.view(batch, heads, width), d, eps=1e-6)
    twice = empty(dtype, batch, 2 * heads, width)  # a class and a distillation token
    kernels.last_attention(x, stats, twice, d, eps=1e-6, key_bias=empty(torch.float32, batch, m))
    a, _ = kernels.slim_linear(z.view(batch, 1, -1), *matrix(dtype, width, width), groups=heads)
    up, down = matrix(dtype, 4 * width, width), matrix(dtype, width, 4 * width)
    second_half(a, x, matrix(dtype, width, width), up, down)


def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def matrix(dtype: torch.dtype, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return empty(dtype, rows, columns), empty(torch.float32, rows)


def specialise(fn: JITFunction, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """What Triton makes of a launch: types, constants, and which values are multiples of 16."""
    signature, constants, attrs = {}, {}, []
    values = dict(zip(fn.arg_names, args)) | options
    for number, parameter in enumerate(fn.params):
        name = parameter.name
        value = values.pop(name)
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attrs.append(number)
        elif parameter.is_constexpr or value is None:
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name] = "constexpr"
            constants[name] = value
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attrs.append(number)
    return {
        "kernel": fn.__name__,
        "module": fn.module,
        "signature": signature,
        "constants": constants,
        "divisible": attrs,
        "options": values,
    }


def compile_launch(launch: dict[str, Any]) -> dict[str, Any]:
    fn = getattr(sys.modules[launch["module"]], launch["kernel"])
    attrs = {(number,): [["tt.divisibility", 16]] for number in launch["divisible"]}
    source = ASTSource(fn, launch["signature"], launch["constants"], attrs)
    target = GPUTarget("cuda", launch["arch"], 32)
    compiled = triton.compile(source, target=target, options=launch["options"])
    ptx = compiled.asm["ptx"]
    return (
        launch
        | resources(compiled.asm["cubin"])
        | {
            "shared": compiled.metadata.shared,
            "matrix": [name for name, text in MATRIX.items() if text in ptx],
        }
    )


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of local memory of a thread, as cuobjdump reads them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", text)
    assert usage, text
    registers, stack, local = map(int, usage.groups())
    return {"registers": registers, "spilled": stack + local}


if __name__ == "__main__":
    main()
