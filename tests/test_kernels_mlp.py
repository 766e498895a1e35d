"""Triton's fused MLP, patch embedding and scatter against plain PyTorch."""

from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import (
    DEVICE,
    DTYPES,
    EPS,
    FLOOR,
    Random,
    check,
    check_stats,
    distance,
    hidden_of,
    kernels,
    rows_of,
)
from torch import Tensor

from slimvit import ops

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.usefixtures("poison_empty")


class Case(NamedTuple):
    """The kept rows are the first n or, with an `index`, any; `out_rows` more: into a buffer.

    `rows` and `hidden_tile` are those of a tile, the table's where they are 0; `spread` is of what
    order the tokens' spreads are, where they have some.
    """

    width: int
    m: int
    n: int
    batch: int = 2
    inner: int = 48
    hidden: int = 80
    act: str = "gelu"
    index: bool = False
    out_rows: int = 0
    offset: float = 0.0
    spread: float = 0.0
    rows: int = 32
    hidden_tile: int = 32

    def __str__(self) -> str:
        given = ((k, v) for k, v in self._asdict().items() if v != self._field_defaults.get(k))
        return ",".join(f"{k}={v}" for k, v in given)


CASES = [
    Case(16, 1, 1, 1, inner=16, hidden=16),
    Case(32, 17, 5, 3, act="gelu_tanh", index=True),
    Case(48, 63, 40, act="quick_gelu", out_rows=63),
    Case(48, 7, 7, 3, inner=160, index=True, offset=30.0),
    Case(64, 63, 63, 1, hidden=256, act="gelu_tanh", rows=0),
    Case(80, 37, 17, 3, act="quick_gelu", index=True, out_rows=19),
    Case(96, 17, 1, 5, inner=64),
    Case(128, 33, 31, inner=80, hidden=144, act="gelu_tanh", out_rows=32, rows=64),
    Case(144, 19, 17, 1, hidden=48, act="quick_gelu", hidden_tile=16),
    Case(160, 40, 33, 1, index=True),
    Case(192, 63, 37, 1, inner=192, hidden=768, index=True, rows=0),
    Case(192, 3, 2, 1, hidden=192, act="quick_gelu", rows=16),
    Case(256, 17, 16, 1, inner=256, hidden=96, act="gelu_tanh", offset=-8.0, out_rows=17),
    Case(16, 1, 1, 1, inner=16, hidden=16, spread=1.0),
    Case(48, 37, 17, 3, index=True, out_rows=19, spread=0.3),
    Case(80, 7, 7, 3, act="quick_gelu", spread=3.0, hidden_tile=16),
    Case(128, 33, 31, 1, act="gelu_tanh", hidden=144, spread=1.0),
    Case(192, 37, 33, 1, inner=192, hidden=768, index=True, spread=0.1, rows=0),
]


def test_halves():
    assert kernels.halves(192) == (128, 64)
    assert kernels.halves(256) == (256, 0)
    for width in range(1, 1025):
        powers = [size for size in (256, 128, 64, 32, 16) if width & size]
        held = sum(powers) == width and len(powers) <= 2 and width <= 256
        assert kernels.halves(width) == ((*powers, 0)[:2] if held else None), width


def second_half(
    case: Case,
    index: Tensor | None,
    attended: Tensor,
    x: Tensor,
    proj: Tensor,
    proj_bias: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor,
    fc2: Tensor,
    fc2_bias: Tensor,
    spread: Tensor | None,
) -> Tensor:
    x = rows_of(x, case.n if index is None else index) + F.linear(attended, proj, proj_bias)
    hidden = hidden_of(x, case.act, fc1, fc1_bias, spread)
    return x + F.linear(hidden, fc2, fc2_bias)


@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_slim_mlp(dtype, case):
    random, width = Random(case.width), case.width
    attended = random(case.batch, case.n, case.inner, dtype=dtype)
    x = (random(case.batch, case.m, width) + case.offset).to(dtype)
    proj = random.weight(width, case.inner, dtype), random(width)
    fc1 = random.weight(case.hidden, width, dtype), random(case.hidden)
    fc2 = random.weight(width, case.hidden, dtype), random(width)
    index = random.index(case.batch, case.n, case.m) if case.index else None
    spread = case.spread * random(case.batch, case.n).square() if case.spread else None
    out = None
    if case.out_rows:
        out = torch.full((case.batch, case.out_rows, width), 7.0, dtype=dtype, device=DEVICE)
    config = kernels.Config(case.rows, case.hidden_tile, 32, 4, 1) if case.rows else None
    got, stats = kernels.slim_mlp(
        *(attended, x, proj, fc1, fc2),
        eps=EPS,
        activation=case.act,
        index=index,
        spread=spread,
        squares=None if spread is None else fc1[0].float().square().sum(1),
        out=out,
        config=config,
    )
    assert out is None or (got is out and (out[:, case.n :] == 7).all())
    got = got[:, : case.n]
    inputs = attended, x, *proj, *fc1, *fc2, spread
    check(got, lambda *given: second_half(case, index, *given), *inputs)
    check_stats(stats[:, : case.n], got)


@dtypes
def test_nan_stays_in_its_image(dtype):
    random = Random()
    attended, x = random(3, 5, 48, dtype=dtype), random(3, 7, 48, dtype=dtype)
    weight, bias = random.weight(48, 48, dtype), random(48)
    layers = [(weight, bias)] * 3
    wanted = kernels.slim_mlp(attended, x, *layers, eps=EPS, activation="gelu")
    attended[1] = torch.nan
    for got, right in zip(
        kernels.slim_mlp(attended, x, *layers, eps=EPS, activation="gelu"), wanted
    ):
        assert got[1].isnan().all()
        assert torch.equal(got[::2], right[::2])


@dtypes
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "quick_gelu"])
def test_without_spread_tokens_are_as_ever(dtype, act):
    random = Random()
    attended, x = random(3, 5, 48, dtype=dtype), random(3, 7, 48, dtype=dtype)
    layers = [(random.weight(48, 48, dtype), random(48)) for _ in range(3)]
    given = {"eps": EPS, "activation": act, "squares": layers[1][0].float().square().sum(1)}
    spread = torch.zeros(3, 5, device=DEVICE)
    wanted, _ = kernels.slim_mlp(attended, x, *layers, **given)
    got, _ = kernels.slim_mlp(attended, x, *layers, **given, spread=spread)
    assert distance(got, wanted.double()) <= FLOOR[dtype]
    spread[1, 3] = 0.5
    other, _ = kernels.slim_mlp(attended, x, *layers, **given, spread=spread)
    assert (other != got).any(2).nonzero().tolist() == [[1, 3]]


class Embedding(NamedTuple):
    """`grid` of patches, each of `patch` pixels; `kind` is the dtype of images."""

    grid: tuple[int, int]
    patch: tuple[int, int]
    width: int
    channels: int = 3
    prefix: int = 1
    batch: int = 2
    kind: torch.dtype | None = None
    rest: tuple[int, int] = (0, 0)  # pixels beyond the last patches
    tile: tuple[int, int, int] | None = (32, 64, 64)

    def __str__(self) -> str:
        given = ((k, v) for k, v in self._asdict().items() if v != self._field_defaults.get(k))
        return ",".join(f"{k}={v}" for k, v in given).replace("torch.", "")


EMBEDDINGS = [
    Embedding((1, 1), (16, 16), 16, 1, batch=1),
    Embedding((3, 5), (16, 16), 48, prefix=2),
    Embedding((5, 3), (14, 14), 64, prefix=5, kind=torch.float32),
    Embedding((2, 3), (14, 14), 80, 1, kind=torch.float64, rest=(3, 5)),
    Embedding((4, 2), (16, 8), 192, prefix=3, kind=torch.float16, tile=(16, 32, 32)),
    Embedding((2, 7), (8, 16), 96, 1, prefix=4, batch=3, kind=torch.bfloat16),
    Embedding((3, 3), (16, 16), 64, prefix=0, batch=1, tile=None),
]


def embedding(case: Embedding, order: Tensor, images: Tensor, weight: Tensor, table: Tensor):
    rows = F.unfold(images, case.patch, stride=case.patch).mT @ weight.flatten(1).mT
    rows = torch.cat([rows.new_zeros(len(rows), case.prefix, rows.shape[2]), rows], 1)
    return rows[:, order] + table


@dtypes
@pytest.mark.parametrize("case", EMBEDDINGS, ids=str)
def test_patch_embedding(dtype, case):
    if case.kind == torch.bfloat16 and kernels.INTERPRETED:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly: it needs a GPU")
    config = kernels.Config(*case.tile, 4, 2) if case.tile else None
    check_embedding(kernels, Random(case.width), dtype, case, config=config)


def check_embedding(
    kernels: ModuleType, random: Random, dtype: torch.dtype, case: Embedding, **options: object
) -> None:
    """Of any set of kernels."""
    patch, channels = case.patch, case.channels
    height, width = (g * p + r for g, p, r in zip(case.grid, patch, case.rest))
    images = random(case.batch, channels, height, width, dtype=case.kind or dtype)
    weight = random.weight(case.width, channels * patch[0] * patch[1], dtype)
    weight = weight.view(case.width, channels, *patch)
    tokens = case.prefix + case.grid[0] * case.grid[1]
    table = random(tokens, case.width)
    places = (
        torch.arange(case.prefix),
        case.prefix + random.index(1, tokens - case.prefix, tokens - case.prefix)[0].cpu(),
    )
    order = torch.cat(places).to(images.device)
    got, stats = kernels.patch_embedding(images, weight, table, order, case.prefix, **options)
    assert got.dtype == dtype
    check(got, lambda *given: embedding(case, order, *given), images, weight, table)
    check_stats(stats, got)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64], ids=str)
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize(
    ("batch", "kept", "length", "width"),
    [(1, 1, 1, 1), (3, 1, 37, 48), (2, 17, 17, 5), (3, 13, 63, 80)],
)
def test_scatter_tokens(dtype, per_image, batch, kept, length, width):
    random = Random(length)
    x = (10 * random(batch, kept, width)).to(dtype)
    index = random.index(batch if per_image else 1, kept, length)
    index = index if per_image else index[0]
    got = kernels.scatter_tokens(x, index, length)
    assert got.dtype == dtype
    assert torch.equal(got, ops.scatter_tokens(x, index, length))
