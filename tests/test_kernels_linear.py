"""Triton's linear layers and row statistics against plain PyTorch in float64."""

from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import (
    ACTIVATE,
    DTYPES,
    EPS,
    FLOOR,
    Random,
    check,
    check_stats,
    distance,
    hidden_of,
    kernels,
    normalise,
    rows_of,
    stats_of,
)
from torch import Tensor

pytestmark = [
    pytest.mark.usefixtures("poison_empty"),
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
]
SMALL = kernels.Config(16, 16, 16, 4, 1)
TALL = kernels.Config(64, 32, 32, 4, 2)
WIDE = kernels.Config(16, 128, 64, 4, 2)


class Qkv(NamedTuple):
    """`index` gathers the kept rows; `offset` is the mean of the rows; no config: the table's."""

    batch: int
    m: int
    n: int
    width: int
    inner: int
    index: bool = False
    offset: float = 0.0
    config: kernels.Config | None = TALL


class Linear(NamedTuple):
    """`residual` is "", "prefix" or "index"; `out_rows` more rows than n: a buffer is given.

    `spread` is of what order the tokens' spreads are, where they have some.
    """

    rows: int
    n: int | None
    inputs: int
    columns: int
    batch: int = 3
    groups: int = 1
    norm: bool = False
    bias: bool = True
    activation: str = "none"
    residual: str = ""
    index: bool = False
    out_rows: int = 0
    emit: bool = False
    offset: float = 0.0
    spread: float = 0.0
    config: kernels.Config | None = TALL


QKV = [
    Qkv(1, 1, 1, 16, 16, config=SMALL),
    Qkv(3, 17, 1, 48, 48),
    Qkv(3, 63, 40, 64, 160, index=True),
    Qkv(1, 63, 63, 80, 80, offset=30.0),
    Qkv(1, 37, 37, 48, 48, index=True, config=SMALL),
    Qkv(1, 63, 37, 192, 192, config=None),
    Qkv(2, 63, 24, 384, 64, index=True, offset=-8.0, config=None),
    Qkv(5, 7, 3, 144, 96, config=WIDE),
]
LINEAR = [
    Linear(1, None, 16, 16, batch=1, config=SMALL),
    Linear(1, None, 48, 16, batch=1, bias=False, norm=True),
    Linear(63, None, 48, 80, norm=True, activation="gelu"),
    Linear(63, 40, 64, 96, norm=True, bias=False, activation="gelu_tanh", config=WIDE),
    Linear(17, 5, 80, 144, norm=True, activation="quick_gelu", offset=30.0),
    Linear(63, 40, 48, 64, norm=True, index=True),
    Linear(40, 7, 96, 48, bias=False, index=True, config=SMALL),
    Linear(63, 40, 144, 48, residual="prefix", emit=True),
    Linear(63, None, 48, 192, residual="index", emit=True),
    Linear(17, None, 64, 48, bias=False, residual="index", activation="gelu"),
    Linear(63, 40, 48, 80, residual="prefix", out_rows=63, emit=True, config=SMALL),
    Linear(7, None, 160, 64, residual="index", out_rows=11, activation="quick_gelu", emit=True),
    Linear(2, None, 32, 112, out_rows=3, emit=True),
    Linear(3, None, 16, 128, batch=1, emit=True, config=WIDE),  # two parts to a tile
    Linear(5, 2, 16, 48, groups=3, bias=False),
    Linear(2, None, 48, 16, groups=5, batch=19),
    Linear(1, None, 80, 80, groups=2, batch=33, config=SMALL),
    Linear(1, 1, 384, 384, batch=2, bias=False, config=None),
    Linear(63, None, 192, 768, batch=1, norm=True, activation="gelu", config=None),
    Linear(63, None, 768, 192, batch=1, residual="prefix", emit=True, config=None),
    Linear(1, None, 16, 16, batch=1, norm=True, activation="gelu", spread=1.0, config=SMALL),
    Linear(63, 40, 48, 80, norm=True, activation="gelu", spread=0.3),
    Linear(17, 5, 80, 144, norm=True, index=True, activation="gelu_tanh", spread=3.0),
    Linear(7, 7, 64, 112, norm=True, activation="quick_gelu", spread=1.0, config=WIDE),
    Linear(17, None, 48, 80, norm=True, bias=False, spread=1.0),
    Linear(19, None, 192, 768, batch=1, norm=True, activation="gelu", spread=0.1, config=None),
    Linear(149, None, 16, 32, batch=1, config=SMALL),  # more than GROUP_M tiles of rows, a few left
]


def name_of(case: NamedTuple) -> str:
    defaults = case._field_defaults | {"config": case.config}
    return ",".join(f"{k}={v}" for k, v in case._asdict().items() if v != defaults.get(k))


@pytest.mark.parametrize("case", QKV, ids=name_of)
def test_qkv(dtype, case):
    check_qkv(kernels, Random(case.m), dtype, case, config=case.config)


def check_qkv(
    kernels: ModuleType, random: Random, dtype: torch.dtype, case: Qkv, **options: object
) -> None:
    """Of any set of kernels; so are the checks below."""
    inner = case.inner
    x = (random(case.batch, case.m, case.width) + case.offset).to(dtype)
    weight, bias = random.weight(3 * inner, case.width, dtype), random(3 * inner)
    index = random.index(case.batch, case.n, case.m) if case.index else None
    sums = weight.float().sum(1)
    q, kv = kernels.slim_qkv(
        x, stats_of(x), weight, sums, bias, case.n, inner, eps=EPS, index=index, **options
    )
    kept = case.n if index is None else index

    def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(normalise(x), weight, bias)

    check(q, lambda *given: rows_of(formula(*given), kept)[..., :inner], x, weight, bias)
    check(kv, lambda *given: formula(*given)[..., inner:], x, weight, bias)


def linear(
    case: Linear,
    index: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    spread: Tensor | None,
) -> Tensor:
    n = x.shape[1] if case.n is None else case.n
    x = rows_of(x, index if case.index else n)
    if spread is not None:
        spread = rows_of(spread[..., None], index if case.index else n)[..., 0]
        return hidden_of(x, case.activation, weight, bias, spread)
    x = normalise(x) if case.norm else x
    columns = case.columns
    groups = [
        F.linear(
            x[..., group * case.inputs : (group + 1) * case.inputs],
            weight[group * columns : (group + 1) * columns],
            None if bias is None else bias[group * columns : (group + 1) * columns],
        )
        for group in range(case.groups)
    ]
    y = ACTIVATE[case.activation](torch.cat(groups, -1))
    if residual is not None:
        y = y + rows_of(residual, index if case.residual == "index" else n)
    return y


@pytest.mark.parametrize("case", LINEAR, ids=name_of)
def test_linear(dtype, case):
    check_linear(kernels, Random(case.rows), dtype, case, config=case.config)


def check_linear(
    kernels: ModuleType, random: Random, dtype: torch.dtype, case: Linear, **options: object
) -> None:
    n = case.n or case.rows
    x = (random(case.batch, case.rows, case.groups * case.inputs) + case.offset).to(dtype)
    weight = random.weight(case.groups * case.columns, case.inputs, dtype)
    bias = random(case.groups * case.columns) if case.bias else None
    residual = random(case.batch, n + 6, case.columns, dtype=dtype) if case.residual else None
    index = None
    if case.index or case.residual == "index":
        index = random.index(case.batch, n, case.rows if case.index else n + 6)
    spread = case.spread * random(case.batch, case.rows).square() if case.spread else None
    out = None
    if case.out_rows:
        out = x.new_full((case.batch, case.out_rows, case.columns), 7.0)
    got, stats = kernels.slim_linear(
        x,
        weight,
        bias,
        n=case.n,
        groups=case.groups,
        stats=stats_of(x) if case.norm else None,
        row_sums=weight.float().sum(1) if case.norm else None,
        eps=EPS,
        activation=case.activation,
        residual=residual,
        index=index,
        spread=spread,
        squares=None if spread is None else weight.float().square().sum(1),
        out=out,
        emit=case.emit,
        **options,
    )
    assert (stats is not None) == case.emit
    assert out is None or (got is out and (out[:, n:] == 7).all())
    got = got[:, :n]
    check(got, lambda *given: linear(case, index, *given), x, weight, bias, residual, spread)
    if case.emit:
        check_stats(stats[:, :n], got)


def test_residual_in_place(dtype):
    """The result may take the place of the residual where rows are the same."""
    random = Random()
    x, residual = random(3, 37, 48, dtype=dtype), random(3, 37, 80, dtype=dtype)
    weight, bias = random.weight(80, 48, dtype), random(80)
    wanted, _ = kernels.slim_linear(x, weight, bias, residual=residual, config=TALL)
    got, _ = kernels.slim_linear(x, weight, bias, residual=residual, out=residual, config=TALL)
    assert got is residual
    assert torch.equal(got, wanted)


def test_nan_stays_in_its_rows(dtype):
    random = Random()
    x, weight, bias = random(3, 7, 48, dtype=dtype), random.weight(48, 48, dtype), random(48)
    sums, index = weight.float().sum(1), random.index(3, 5, 7)

    def call() -> tuple[Tensor, ...]:
        folded = {"stats": kernels.row_stats(x), "row_sums": sums, "eps": EPS, "emit": True}
        q, kv = kernels.slim_qkv(
            x, folded["stats"], weight, sums, bias, 5, 16, eps=EPS, index=index, config=TALL
        )
        return q, kv, *kernels.slim_linear(x, weight, bias, **folded, config=TALL)

    wanted = call()
    x[1] = torch.nan
    for got, right in zip(call(), wanted):
        assert got[1].isnan().all()
        assert torch.equal(got[::2], right[::2])


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "quick_gelu"])
def test_without_spread_tokens_are_as_ever(dtype, activation):
    random = Random()
    x, weight, bias = random(3, 7, 48, dtype=dtype), random.weight(80, 48, dtype), random(80)
    given = {"stats": stats_of(x), "row_sums": weight.float().sum(1), "eps": EPS}
    given |= {"activation": activation, "config": TALL}
    wanted, _ = kernels.slim_linear(x, weight, bias, **given)
    spread, squares = torch.zeros_like(x[..., 0].float()), weight.float().square().sum(1)
    got, _ = kernels.slim_linear(x, weight, bias, **given, spread=spread, squares=squares)
    assert distance(got, wanted.double()) <= FLOOR[dtype]
    spread[1, 5] = 0.5
    other, _ = kernels.slim_linear(x, weight, bias, **given, spread=spread, squares=squares)
    assert (other != got).any(2).nonzero().tolist() == [[1, 5]]


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize(
    ("batch", "m", "width"), [(1, 1, 16), (3, 7, 48), (1, 17, 64), (3, 5, 80), (2, 9, 320)]
)
def test_row_stats(dtype, batch, m, width, offset):
    x = (Random(width)(batch, m, width) + offset).to(dtype)
    check_stats(kernels.row_stats(x), x)
