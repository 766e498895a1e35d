"""The C++ block against slim_block in float64: it errs at most twice as much as PyTorch does."""

import copy
import functools
import math
from typing import NamedTuple

import pytest
import torch
from instruction_sets import DTYPES, isa  # noqa: F401
from references import ACTIVATIONS, off, randomise
from torch import Tensor, nn

from slimvit.errors import SlimvitError
from slimvit.ops import BlockParts, ExtraKey, FoldedBlock, pack_block, slim_block, zero_key

# PyTorch's error is zero by luck now and then: this much is rounding.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


class Case(NamedTuple):
    """A block and its input; `index` is "none", "unsorted", "twice" (duplicates) or "many"."""

    m: int
    n: int
    batch: int = 3
    width: int = 64
    heads: int = 2
    head_dim: int = 32
    hidden: int = 144
    act: str = "gelu"
    biases: bool = True
    index: str = "none"
    key_bias: str = "none"
    extra: int = 0  # zero rows that one extra key stands for
    sharpness: float = 1.0  # of the softmax
    lone: bool = False  # packed for a lone query or two

    def __str__(self) -> str:
        changed = (f"{name}={v}" for name, v in self._asdict().items() if v != DEFAULTS.get(name))
        return ",".join(changed)


DEFAULTS = Case._field_defaults
CASES = [
    Case(1, 1, 1),
    Case(1, 1, 8, act="quick_gelu", extra=5),
    Case(2, 1, 1, head_dim=16, heads=1, hidden=16, biases=False),
    Case(2, 2, 8, act="gelu_tanh", index="unsorted", key_bias="Bm"),
    Case(63, 1, 3, head_dim=80, extra=1),
    Case(63, 63, 1, index="twice", key_bias="m", sharpness=60.0),
    Case(63, 40, 8, head_dim=16, heads=4, act="quick_gelu", key_bias="Bm", extra=97),
    Case(63, 150, 3, index="many", act="gelu_tanh"),
    Case(197, 104, 3, 192, 3, 64, 768, index="unsorted", extra=93),
    Case(197, 197, 1, 192, 3, 64, 768, sharpness=60.0),
    Case(197, 196, 8, 48, 3, 48, 80, act="gelu_tanh", biases=False, key_bias="m"),
    Case(197, 1, 3, 384, 6, 64, 1536, act="quick_gelu", key_bias="Bm"),
    Case(257, 256, 1, 64, 2, 80, 784, index="unsorted", sharpness=60.0, extra=320),
    Case(257, 24, 3, 192, 6, 32, 100 * 16, biases=False, index="twice", extra=2),
    Case(577, 300, 1, 192, 3, 64, 192, act="gelu_tanh", key_bias="m"),
    Case(197, 97, 1, 768, 12, 64, 3072),
    Case(1, 1, 3, 16, 1, 16, 16, lone=True),
    Case(63, 1, 8, 48, 3, 16, lone=True, index="unsorted", key_bias="Bm"),
    Case(63, 2, 3, 80, 2, 80, lone=True, index="twice"),
    Case(64, 1, 3, lone=True, extra=9),
    Case(197, 2, 1, 192, 3, 64, 768, biases=False, lone=True, key_bias="m"),
    Case(577, 1, 3, 384, 6, 64, 384, lone=True),
    Case(63, 40, 3, lone=True),
]


def make_parts(case: Case) -> BlockParts:
    inner, identity = case.heads * case.head_dim, nn.Identity()
    linear = functools.partial(nn.Linear, bias=case.biases)
    mlp = nn.Sequential(
        linear(case.width, case.hidden), ACTIVATIONS[case.act](), linear(case.hidden, case.width)
    )
    own = {
        "norm1": nn.LayerNorm(case.width, eps=1e-6),
        "norm2": nn.LayerNorm(case.width, eps=1e-5),
        "qkv": linear(case.width, 3 * inner),
        "proj": linear(inner, case.width),
        "mlp": mlp,
    }
    for seed, module in enumerate(own.values()):
        randomise(module, seed)
    with torch.no_grad():
        own["qkv"].weight[:inner] *= case.sharpness
    nones = dict.fromkeys(BlockParts._fields, identity)
    sizes = {"heads": case.heads, "head_dim": case.head_dim, "attn_drop": 0.0, "gate": None}
    return BlockParts(**{**nones, **own, **sizes})


def cast(parts: BlockParts, dtype: torch.dtype) -> BlockParts:
    modules = {
        name: copy.deepcopy(part).to(dtype)
        for name, part in parts._asdict().items()
        if isinstance(part, nn.Module)
    }
    return parts._replace(**modules)


def make_index(case: Case) -> Tensor | None:
    if case.index == "none":
        return None
    generator = torch.Generator().manual_seed(case.m)
    if case.index == "unsorted":
        orders = [torch.randperm(case.m, generator=generator) for _ in range(case.batch)]
        return torch.stack(orders)[:, : case.n]
    return torch.randint(case.m, (case.batch, case.n), generator=generator)


def make_key_bias(case: Case) -> Tensor | None:
    shape = {"none": None, "m": (case.m,), "Bm": (case.batch, case.m)}[case.key_bias]
    generator = torch.Generator().manual_seed(case.n)
    return None if shape is None else torch.randn(shape, generator=generator).bfloat16().float()


class Problem(NamedTuple):
    """What a case computes, in float64, and how far PyTorch is from that in some dtype."""

    parts: BlockParts
    extra: ExtraKey | None
    x: Tensor
    index: Tensor | None
    key_bias: Tensor | None
    wanted: Tensor
    torchs: float


@functools.cache
def problem(case: Case, dtype: torch.dtype) -> Problem:
    parts = cast(make_parts(case), dtype)
    generator = torch.Generator().manual_seed(case.m + case.batch)
    # The worst of a few rows is luck: where there are few, PyTorch's error is that of more draws.
    draws = [
        torch.randn(case.m, case.batch, case.width, generator=generator).to(dtype)
        for _ in range(max(1, 24 // (case.batch * case.n)))
    ]
    index, key_bias = make_index(case), make_key_bias(case)
    keep = case.n if index is None else index

    @torch.no_grad()
    def answer(x: Tensor, dtype: torch.dtype) -> Tensor:
        own = cast(parts, dtype)
        extra = zero_key(own, case.extra, x.to(dtype)) if case.extra else None
        bias = None if key_bias is None else key_bias.to(dtype)
        return slim_block(x.to(dtype), own, keep, key_bias=bias, extra_key=extra).transpose(0, 1)

    wanted = [answer(x, torch.float64) for x in draws]
    extra = zero_key(parts, case.extra, draws[0]) if case.extra else None
    torchs = max(off(answer(x, dtype), right) for x, right in zip(draws, wanted, strict=True))
    return Problem(parts, extra, draws[0].float(), index, key_bias, wanted[0], torchs)


def pack(p: Problem, dtype: torch.dtype, lone: bool = False) -> Tensor:
    return pack_block(FoldedBlock(p.parts), p.extra, dtype, lone)


def call(p: Problem, packed: Tensor, n: int, x: Tensor | None = None) -> Tensor:
    """[B, n, D]"""
    x = p.x if x is None else x
    return torch.ops.slimvit.slim_block(x, packed, n, p.index, p.key_bias).transpose(0, 1)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errs_no_more_than_torch(poison_empty, case, dtype):
    p = problem(case, dtype)
    got = call(p, pack(p, dtype, case.lone), case.n)
    assert got.dtype == torch.float32
    assert off(got, p.wanted) <= max(2 * p.torchs, FLOOR[dtype])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype):
    """Images first, every other column or token, and one image for all: the same bits."""
    case = Case(63, 40, 3, index="unsorted", key_bias="Bm")
    p = problem(case, dtype)
    packed = pack(p, dtype)
    wanted = call(p, packed, case.n)
    images_first = p.x.transpose(0, 1).contiguous().transpose(0, 1)
    columns = p.x.repeat_interleave(2, 2)[:, :, ::2]
    tokens = p.x.repeat_interleave(2, 0)[::2]
    columns_first = p.x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for view in (images_first, columns, tokens, columns_first):
        assert not view.is_contiguous()
        assert torch.equal(call(p, packed, case.n, view), wanted)
    strided = p._replace(
        index=p.index.repeat_interleave(2, 1)[:, ::2], key_bias=p.key_bias.t().contiguous().t()
    )
    assert torch.equal(call(strided, packed, case.n), wanted)
    one = call(p, packed, case.n, p.x[:, :1].expand(-1, 3, -1))
    assert torch.equal(one, call(p, packed, case.n, p.x[:, :1].repeat(1, 3, 1)))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 40])
def test_threads_and_batch_do_not_matter(n, dtype):
    """No sum depends on which worker computes it or on what else is computed: the same bits."""
    case = Case(63, n, 5, extra=0 if n == 1 else 3, lone=n == 1)
    p = problem(case, dtype)
    packed = pack(p, dtype, case.lone)
    before = torch.get_num_threads()
    try:
        answers = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            answers.append(call(p, packed, case.n))
            alone = [call(p, packed, case.n, image) for image in p.x.split(1, dim=1)]
            answers.append(torch.cat(alone))
    finally:
        torch.set_num_threads(before)
    for answer in answers[1:]:
        assert torch.equal(answer, answers[0])


@pytest.mark.usefixtures("isa")
def test_input_is_left_alone():
    p = problem(CASES[6], torch.float32)
    before = [tensor.clone() for tensor in (p.x, p.key_bias)]
    call(p, pack(p, torch.float32), CASES[6].n)
    assert torch.equal(p.x, before[0])
    assert torch.equal(p.key_bias, before[1])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_masked_key_counts_for_nothing(dtype):
    """A bias of -inf is what attending to fewer keys is."""
    case = Case(63, 40, 3)
    p = problem(case, dtype)
    packed = pack(p, dtype)
    bias = torch.zeros(63)
    bias[50:] = -math.inf
    got = call(p._replace(key_bias=bias), packed, case.n)
    assert off(got, call(p, packed, case.n, p.x[:50])) <= FLOOR[dtype]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_stays_in_its_image(act, dtype):
    case = Case(63, 40, 3, key_bias="Bm", act=act)
    p = problem(case, dtype)
    packed = pack(p, dtype)
    wanted = call(p, packed, case.n)
    x = p.x.clone()
    x[5, 1, 7] = math.nan
    got = call(p, packed, case.n, x)
    assert got[1].isnan().all()
    assert torch.equal(got[::2], wanted[::2])
    assert torch.equal(call(p, packed, case.n), wanted)  # the same memory, now full of NaN


def test_no_images():
    case = Case(63, 40, 3)
    p = problem(case, torch.float32)
    packed = pack(p, torch.float32)
    assert call(p, packed, case.n, p.x[:, :0]).shape == (0, 40, 64)
    index = torch.empty(0, 40, dtype=torch.int64)
    assert call(p._replace(index=index), packed, case.n, p.x[:, :0]).shape == (0, 40, 64)
    many = torch.empty(0, 80, dtype=torch.int64)  # an index may name tokens twice
    assert call(p._replace(index=many), packed, 80, p.x[:, :0]).shape == (0, 80, 64)


class TestRefused:
    """Whatever C++ would read beyond its end or take for something else."""

    def refuses(self, message: str, **changes: object) -> None:
        case = Case(63, 40, 3)
        p = problem(case, torch.float32)
        arguments = {"x": p.x, "pack": pack(p, torch.float32), "n": 40, **changes}
        with pytest.raises(SlimvitError, match=message):
            torch.ops.slimvit.slim_block(**arguments)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
    def test_dtype_of_x(self, dtype):
        name = str(dtype).removeprefix("torch.")
        message = rf"x must be \[m, B, D\], float32, on the CPU, got \[63, 3, 64\], {name}, on cpu"
        self.refuses(message, x=torch.ones(63, 3, 64).to(dtype))

    def test_shape_of_x(self):
        self.refuses(r"x must be \[m, B, D\], .* got \[63, 64\]", x=torch.ones(63, 64))
        self.refuses(r"x must be \[m, B, 64\], got \[63, 3, 48\]", x=torch.ones(63, 3, 48))
        self.refuses(r"n must be in \[1, m\] = \[1, 0\], got 40", x=torch.ones(0, 3, 64))

    @pytest.mark.parametrize("n", [64, 1 << 40, 0, -1])
    def test_n(self, n):
        self.refuses(rf"n must be in \[1, m\] = \[1, 63\], got {n}", n=n)

    def test_index(self):
        rule = r"index must be \[B, n\] = \[3, 40\], int64, on the CPU, got "
        index = torch.zeros(3, 40, dtype=torch.int64)
        self.refuses(rule + r"\[40\], int64, on cpu", index=index[0])
        self.refuses(rule + r"\[3, 39\], int64, on cpu", index=index[:, 1:])
        self.refuses(rule + r"\[3, 40\], int32, on cpu", index=index.int())
        for wrong in (63, -1):
            index[2, 39] = wrong
            self.refuses(rf"index must be in \[0, m\) = \[0, 63\), got {wrong}", index=index)

    def test_key_bias(self):
        rule = r"key_bias must be \[m\] = \[63\] or \[B, m\] = \[3, 63\], floating point, .* got "
        self.refuses(rule + r"\[62\], float32", key_bias=torch.zeros(62))
        self.refuses(rule + r"\[1, 63\], float32", key_bias=torch.zeros(1, 63))
        self.refuses(rule + r"\[\], float32", key_bias=torch.zeros(()))
        self.refuses(rule + r"\[63\], int64", key_bias=torch.zeros(63, dtype=torch.int64))

    def test_pack(self):
        packed = pack(problem(Case(63, 40, 3), torch.float32), torch.float32)
        size = packed.numel()
        self.refuses(f"cut off: it has {size - 64} bytes instead of {size}", pack=packed[:-64])
        self.refuses("the pack of the block is too short", pack=packed[:8])
        self.refuses("the pack of the block is too short", pack=packed[:0])
        self.refuses("the pack of the block is something else", pack=packed[1:])
        self.refuses("is something else", pack=torch.zeros_like(packed))
        rule = "pack must be one-dimensional, uint8, contiguous, on the CPU, got "
        self.refuses(rule + r".*uint8, on cpu", pack=packed.repeat_interleave(2)[::2])
        self.refuses(rule + r".*uint8, on cpu", pack=packed[None])
        self.refuses(rule + r".*float32, on cpu", pack=packed.view(torch.float32))

    @pytest.mark.parametrize("size", ["width", "head_dim", "hidden"])
    def test_odd_sizes(self, size):
        case = Case(63, 40, 3)._replace(**{size: 40})
        with pytest.raises(SlimvitError, match=f"{size} must be a positive multiple of 16, got 40"):
            pack(problem(case, torch.float32), torch.float32)
