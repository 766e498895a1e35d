"""Blocks and embedding on GPUs: `torch.library` ops over fused kernels, tokens after images."""

from __future__ import annotations

import torch
from torch import Tensor

from slimvit.backends import fused
from slimvit.ops.devices import require_one_device

_library = torch.library.Library("slimvit", "FRAGMENT")
_library.define(
    "patch_embedding(Tensor images, Tensor weight, Tensor table, Tensor order, int prefix,"
    " bool tf32=False, str backend='triton') -> (Tensor, Tensor)"
)
_library.define(
    "fused_block(Tensor x, Tensor? stats, Tensor[] weights, int n, int heads, str activation,"
    " float[] eps, int zero_rows=0, bool idle=False, bool tf32=False, Tensor? index=None,"
    " Tensor? key_bias=None, Tensor? spread=None, str backend='triton') -> (Tensor, Tensor)"
)
_library.define(
    "scatter_tokens(Tensor x, Tensor index, SymInt length, str backend='triton') -> Tensor"
)
for _name in ("patch_embedding", "fused_block", "scatter_tokens"):
    for _key in ("CUDA", "CPU"):  # CPU: interpreted or emulated, in tests
        _library.impl(_name, getattr(fused, _name), _key)
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("slimvit::patch_embedding", lib=_library)
def _patch_embedding(
    images: Tensor,
    weight: Tensor,
    table: Tensor,
    order: Tensor,
    prefix: int,
    tf32: bool = False,
    backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    require_one_device("patch_embedding", weight, images, table, order)
    tokens, width = table.shape
    x = weight.new_empty(images.shape[0], tokens, width)
    return x, row_statistics(x)


@torch.library.register_fake("slimvit::fused_block", lib=_library)
def _fused_block(
    x: Tensor,
    stats: Tensor | None,
    weights: list[Tensor],
    n: int,
    heads: int,
    activation: str,
    eps: list[float],
    zero_rows: int = 0,
    idle: bool = False,
    tf32: bool = False,
    index: Tensor | None = None,
    key_bias: Tensor | None = None,
    spread: Tensor | None = None,
    backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    require_one_device("fused_block", x, stats, weights, index, key_bias, spread)
    out = x.new_empty(x.shape[0], x.shape[1] if idle else n, x.shape[2])
    return out, row_statistics(out)


@torch.library.register_fake("slimvit::scatter_tokens", lib=_library)
def _scatter_tokens(x: Tensor, index: Tensor, length: int, backend: str = "triton") -> Tensor:
    require_one_device("scatter_tokens", x, index)
    return x.new_empty(x.shape[0], length, x.shape[2])


def row_statistics(x: Tensor) -> Tensor:
    """Room for the statistics of rows, [B, m, parts, 2]."""
    parts = x.shape[2] // fused.part_width(x.shape[2])
    return x.new_empty(*x.shape[:2], parts, 2, dtype=torch.float32)
