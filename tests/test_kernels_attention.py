"""Triton's rectangular attention, and the last block's without keys, against float64."""

import math
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from kernel_checks import DTYPES, EPS, Random, check, kernels, normalise, stats_of
from torch import Tensor

from slimvit.kernels.slim_attention import pieces

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.usefixtures("poison_empty")


class Case(NamedTuple):
    """`key_bias` is "", "m" or "Bm", `shut` keys of which, the first, have -inf.

    `extra` is how many zero rows an extra key stands for, `sharpness` that of the softmax;
    `queries` and `keys` are those of a tile, the table's where there is no such number.
    """

    m: int
    n: int
    heads: int = 1
    d: int = 16
    batch: int = 1
    key_bias: str = ""
    shut: int = 0
    extra: int = 0
    sharpness: float = 1.0
    queries: int = 64
    keys: int = 64

    def __str__(self) -> str:
        given = ((k, v) for k, v in self._asdict().items() if v != self._field_defaults.get(k))
        return ",".join(f"{k}={v}" for k, v in given)


# Up to 64 keys are taken at once in float32, up to 224 in half precision (128 of wide
# heads): more in a running way.
CASES = [
    Case(1, 1, queries=16),
    Case(1, 1, 3, 32, 2, extra=5),
    Case(2, 1, 2, 64, 3, key_bias="Bm"),
    Case(2, 2, 1, 80, 2, key_bias="m", shut=1, extra=1),
    Case(17, 1, 3, 16, 2, key_bias="m"),
    Case(17, 17, 2, 80, 2, key_bias="Bm", shut=16, queries=16),
    Case(17, 5, 2, 48, 3, key_bias="Bm", shut=17, extra=9),
    Case(63, 63, 2, 64, 2, queries=32),
    Case(63, 40, 1, 80, 2, extra=134, key_bias="m", queries=16),
    Case(63, 37, 3, 32, 2, sharpness=60.0, queries=0, keys=0),
    Case(64, 3, 2, 32, 2, key_bias="Bm", shut=40),
    Case(65, 64, 1, 16, 3, extra=2, queries=32, keys=16),
    Case(141, 131, 1, 64, 1, queries=0, keys=0),
    Case(141, 33, 2, 80, 2, key_bias="Bm", shut=77, queries=32, keys=32),
    Case(141, 1, 3, 16, 2, key_bias="m", extra=56),
    Case(197, 111, 1, 32, 1, key_bias="m", extra=86, sharpness=60.0),
    Case(197, 5, 2, 64, 3, key_bias="Bm", shut=150, queries=16),
    Case(111, 5, 1, 80, 2),
    Case(128, 3, 1, 128, 1),
    Case(223, 5, 1, 32, 2),
    Case(225, 5, 1, 32, 2),
    Case(257, 129, 1, 64, 1, key_bias="m"),
    Case(257, 2, 2, 80, 2, extra=320),
    Case(272, 31, 2, 16, 2, key_bias="Bm", shut=256, extra=1),
    Case(273, 31, 2, 16, 2, key_bias="Bm", shut=272),
    Case(273, 17, 2, 80, 2, key_bias="Bm", shut=273, extra=12, keys=32),
    Case(577, 61, 1, 64, 1, extra=448, queries=32),
    Case(577, 9, 2, 32, 2, key_bias="m", shut=130, sharpness=60.0, queries=0, keys=0),
    Case(1025, 65, 1, 80, 1),
    Case(1025, 1, 2, 16, 2, key_bias="Bm", shut=500, extra=3, keys=128),
]


class Last(NamedTuple):
    """`queries` are n · H, `shut` keys are at -inf, `zeros` rows are zero, `keys` to a tile."""

    m: int
    queries: int
    width: int
    d: int = 16
    batch: int = 2
    key_bias: str = ""
    shut: int = 0
    zeros: int = 0
    sharpness: float = 1.0
    offset: float = 0.0
    keys: int = 16

    __str__ = Case.__str__


LAST = [
    Last(1, 1, 48, batch=1),
    Last(1, 3, 64, zeros=7),
    Last(2, 2, 16, key_bias="Bm", shut=1),
    Last(17, 1, 80, 80, key_bias="m"),
    Last(17, 6, 48, key_bias="Bm", shut=16, zeros=1),
    Last(17, 17, 192, 64, key_bias="Bm", shut=17, zeros=3),
    Last(63, 24, 192, 64, sharpness=10.0, keys=0),
    Last(63, 32, 48, 3, batch=3, key_bias="m", shut=40, offset=30.0),
    Last(64, 12, 768, 64),
    Last(111, 24, 384, 64, batch=1, zeros=86, key_bias="m"),
    Last(141, 31, 64, 32, key_bias="Bm", shut=100, keys=64),
    Last(37, 32, 1024, 64, batch=1, keys=0),
    Last(41, 6, 112, 56, key_bias="Bm", zeros=5),  # rows in four pieces, the last cut off
    Last(37, 7, 448, 64),
]


def biases(case: Case | Last, random: Random) -> Tensor | None:
    shape = {"": None, "m": (case.m,), "Bm": (case.batch, case.m)}[case.key_bias]
    if shape is None:
        return None
    bias = random(*shape)
    bias[..., : case.shut] = -math.inf  # of the last image only, if images have their own
    if case.key_bias == "Bm":
        bias[:-1] = random(case.batch - 1, case.m)
    return bias


def softmax(s: Tensor, key_bias: Tensor | None) -> Tensor:
    """Of logits [B, queries, m] with the bias of each key."""
    if key_bias is not None:
        s = s + (key_bias[:, None] if key_bias.dim() == 2 else key_bias)
    return s.softmax(-1)


def with_column(key_bias: Tensor | None, s: Tensor, value: float) -> Tensor:
    """The biases of logits `s`, of which there is one more column than biases."""
    shape = (s.shape[-1] - 1,) if key_bias is None else key_bias.shape
    bias = s.new_zeros(shape) if key_bias is None else key_bias
    return torch.cat([bias, bias.new_full((*shape[:-1], 1), value)], -1)


def attention(
    case: Case, q: Tensor, kv: Tensor, key_bias: Tensor | None, extra: Tensor | None
) -> Tensor:
    if extra is not None:
        kv = torch.cat([kv, extra.expand(case.batch, 1, -1)], 1)
    answers = []
    for head in range(case.heads):
        part = slice(head * case.d, (head + 1) * case.d)
        k, v = kv[..., : q.shape[2]][..., part], kv[..., q.shape[2] :][..., part]
        s = q[..., part] @ k.mT * case.d**-0.5
        bias = key_bias if extra is None else with_column(key_bias, s, math.log(case.extra))
        answers.append(softmax(s, bias) @ v)
    return torch.cat(answers, -1)


@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_slim_attention(dtype, case):
    config = kernels.Config(case.queries, case.keys, 0, 4, 1) if case.queries else None
    check_attention(kernels, Random(case.m + case.n), dtype, case, config=config)


def check_attention(
    kernels: ModuleType, random: Random, dtype: torch.dtype, case: Case, **options: object
) -> None:
    """Of any set of kernels; so is the check below."""
    inner = case.heads * case.d
    q = random(case.batch, case.n, inner, dtype=dtype) * case.sharpness
    kv = random(case.batch, case.m, 2 * inner, dtype=dtype)
    key_bias = biases(case, random)
    extra = random(2 * inner) if case.extra else None
    got = kernels.slim_attention(
        q,
        kv,
        case.heads,
        key_bias=key_bias,
        extra=extra,
        extra_bias=math.log(case.extra or 1),
        **options,
    )
    assert got.dtype == dtype
    check(got, lambda *given: attention(case, *given), q, kv, key_bias, extra)


@dtypes
@pytest.mark.parametrize("m", [17, 197, 300])
def test_nan_stays_in_its_image(dtype, m):
    random = Random(m)
    q, kv = random(3, 5, 32, dtype=dtype), random(3, m, 64, dtype=dtype)
    wanted = kernels.slim_attention(q, kv, 2)
    kv[1, 3, 7] = math.nan  # a key of the first head
    got = kernels.slim_attention(q, kv, 2)
    assert got[1, :, :16].isnan().all()
    assert torch.equal(got[::2], wanted[::2])


def last_answer(
    case: Last, x: Tensor, u: Tensor, key_bias: Tensor | None, zero: Tensor | None
) -> Tensor:
    y = normalise(x)
    if zero is not None:
        y = torch.cat([y, zero.expand(case.batch, 1, -1)], 1)
    s = u @ y.mT * case.d**-0.5
    bias = key_bias if zero is None else with_column(key_bias, s, math.log(case.zeros))
    return softmax(s, bias) @ y


@dtypes
@pytest.mark.parametrize("case", LAST, ids=str)
def test_last_attention(dtype, case):
    config = kernels.Config(0, case.keys, 0, 4, 1) if case.keys else None
    check_last_attention(kernels, Random(case.m + case.queries), dtype, case, config=config)


def check_last_attention(
    kernels: ModuleType, random: Random, dtype: torch.dtype, case: Last, **options: object
) -> None:
    x = (random(case.batch, case.m, case.width) + case.offset).to(dtype)
    scale = case.sharpness * (case.d / case.width) ** 0.5
    u = (random(case.batch, case.queries, case.width) * scale).to(dtype)
    key_bias = biases(case, random)
    zero = x.new_zeros(case.width) if case.zeros else None
    got = kernels.last_attention(
        x,
        stats_of(x),
        u,
        case.d,
        eps=EPS,
        key_bias=key_bias,
        zero_bias=math.log(case.zeros) if case.zeros else None,
        **options,
    )
    assert got.dtype == dtype
    check(got, lambda *given: last_answer(case, *given), x, u, key_bias, zero)


@dtypes
def test_nan_stays_in_its_image_of_the_last_block(dtype):
    random = Random()
    x, u = random(3, 17, 48, dtype=dtype), random(3, 5, 48, dtype=dtype)
    wanted = kernels.last_attention(x, kernels.row_stats(x), u, 16, eps=EPS)
    x[1, 3, 7] = math.nan
    got = kernels.last_attention(x, kernels.row_stats(x), u, 16, eps=EPS)
    assert got[1].isnan().all()
    assert torch.equal(got[::2], wanted[::2])


class TestPieces:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("d", [16, 64, 80, 128])
    def test_cover_all_keys_with_little_waste(self, dtype, d):
        longest = 64 if dtype == torch.float32 else 224 if d <= 64 else 128
        for m in range(1, longest + 1):
            found = [size for size in pieces(m, d, 32, dtype) if size]
            assert all(size >= 16 and size & (size - 1) == 0 for size in found)
            assert found == sorted(found, reverse=True)
            assert sum(found) == -(-m // 16) * 16
        for m in (longest + 1, 577, 1025):
            assert pieces(m, d, 32, dtype) == (32, -1, 0)

    def test_examples(self):
        for m, wanted in {
            1: (16, 0, 0),
            141: (128, 16, 0),
            197: (128, 64, 16),
            224: (128, 64, 32),
            225: (64, -1, 0),
        }.items():
            assert pieces(m, 64, 64, torch.float16) == wanted
        assert pieces(128, 80, 64, torch.float16) == (128, 0, 0)
        assert pieces(129, 80, 64, torch.float16) == (64, -1, 0)
