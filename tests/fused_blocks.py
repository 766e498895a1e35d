"""Plain blocks and their input for the tests of the fused block and of its ops."""

import functools
from typing import NamedTuple

import torch
from kernel_checks import DEVICE, Random
from references import ACTIVATIONS, randomise
from torch import Tensor, nn

from slimvit.ops import BlockParts, FoldedBlock, FusedBlock


class Case(NamedTuple):
    """A block and its input; `zero_rows` are pruned tokens that remain as zeros."""

    m: int
    n: int
    batch: int = 2
    width: int = 48
    heads: int = 3
    head_dim: int = 16
    hidden: int = 80
    act: str = "gelu"
    biases: bool = True
    norm_bias: bool = True
    index: bool = False
    key_bias: str = ""
    zero_rows: int = 0
    idle: bool = False
    last: bool = False

    def __str__(self) -> str:
        given = ((k, v) for k, v in self._asdict().items() if v != self._field_defaults.get(k))
        return ",".join(f"{k}={v}" for k, v in given)


def make_parts(case: Case, dtype: torch.dtype = torch.float32) -> BlockParts:
    """A plain block on the device whose weights `dtype` holds."""
    inner, identity = case.heads * case.head_dim, nn.Identity()
    linear = functools.partial(nn.Linear, bias=case.biases)
    norm = functools.partial(nn.LayerNorm, case.width, bias=case.norm_bias)
    mlp = [
        linear(case.width, case.hidden),
        ACTIVATIONS[case.act](),
        linear(case.hidden, case.width),
    ]
    own = {
        "norm1": norm(eps=1e-6),
        "norm2": norm(eps=1e-5),
        "qkv": linear(case.width, 3 * inner),
        "proj": linear(inner, case.width),
        "mlp": nn.Sequential(*mlp),
    }
    for seed, module in enumerate(own.values()):
        randomise(module, seed).to(DEVICE, dtype)
    nones = dict.fromkeys(BlockParts._fields, identity)
    sizes = {"heads": case.heads, "head_dim": case.head_dim, "attn_drop": 0.0, "gate": None}
    return BlockParts(**{**nones, **own, **sizes})


def make(case: Case, dtype: torch.dtype = torch.float32, **options: object) -> FusedBlock:
    block = FoldedBlock(make_parts(case, dtype))
    options = {"zero_rows": case.zero_rows, "last": case.last, **options}
    return FusedBlock(block, dtype, **options)


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, int | Tensor, Tensor | None]:
    """Tokens, which of them are kept, and the bias of each."""
    random = Random(case.m)
    x = random(case.batch, case.m, case.width, dtype=dtype)
    keep = random.index(case.batch, case.n, case.m) if case.index else case.n
    shape = {"": None, "m": (case.m,), "Bm": (case.batch, case.m)}[case.key_bias]
    return x, keep, None if shape is None else random(*shape)
