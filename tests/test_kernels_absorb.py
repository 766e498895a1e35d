"""Triton's choice of tokens: importances, scores, the highest of them, and what absorbs what."""

import math
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
    check_stats,
    distance,
    kernels,
    stats_of,
)
from torch import Tensor

from slimvit.kernels import Config
from slimvit.ops import Alive, Choice, absorb_tokens

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.usefixtures("poison_empty")


class Case(NamedTuple):
    """`tokens` are those that the head reads; tiles of cosines are `tile` by `tile`.

    `candidates` may be pruned; None for all patches.
    """

    m: int
    width: int
    heads: int
    d: int
    batch: int = 1
    tokens: int = 1
    prefix: int = 1
    sized: bool = False
    sharpness: float = 1.0
    tile: int = 64
    candidates: int | None = None

    @property
    def some(self) -> int:
        return self.m - self.prefix if self.candidates is None else self.candidates

    def __str__(self) -> str:
        given = ((k, v) for k, v in self._asdict().items() if v != self._field_defaults.get(k))
        return ",".join(f"{k}={v}" for k, v in given)


SCORED = [
    Case(2, 64, 2, 32, 3),
    Case(5, 48, 3, 16, 3, 2, 2, True, tile=0),
    Case(17, 112, 2, 56, 1, 1, 5, tile=16),
    Case(63, 64, 1, 64, 3, 1, 1, True),
    Case(63, 192, 6, 32, 1, 2, 5, sharpness=30.0, candidates=1),
    Case(197, 192, 3, 64, 1, 1, 2, True, candidates=33),
    Case(257, 384, 6, 64),
    Case(577, 64, 2, 32, 1, 2, 2, True),
]


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, q, kv, the norm's weight and bias, and sizes or None."""
    random, inner = Random(case.m), case.heads * case.d
    x = random(case.batch, case.m, case.width, dtype=dtype) + 0.5
    x[:, 1::3] = x[:, : case.m - 1 : 3] + 0.25 * x[:, 1::3]  # some tokens are much alike
    q = random(case.batch, case.tokens, inner, dtype=dtype) * case.sharpness
    kv = random(case.batch, case.m, 2 * inner, dtype=dtype)
    size = 1 + (3 * random(case.batch, case.m).abs()).round() if case.sized else None
    return x, q, kv, 1 + 0.3 * random(case.width), 0.3 * random(case.width), size


def formulas(case: Case, x, q, kv, weight, bias, size) -> tuple[Tensor, Tensor]:
    """Importances, and all cosines, in float32 or wider after the norm."""
    wide = torch.promote_types(x.dtype, torch.float32)
    heads = (case.heads, case.d)
    q, k, v = (
        t.to(wide).unflatten(2, heads).transpose(1, 2) for t in (q, *kv.chunk(2, -1))
    )  # [B, H, ·, d]
    logits = q @ k.mT * case.d**-0.5
    if size is not None:
        logits = logits + size.to(wide).log()[:, None, None]
    importance = (logits.softmax(-1).mean(2) * v.norm(dim=-1)).sum(1)
    y = F.normalize(F.layer_norm(x, x.shape[-1:], weight, bias, EPS).to(wide), dim=-1)
    return importance, y @ y.mT


def check_scored(case: Case, given: tuple[Tensor, ...], got: tuple[Tensor, ...]) -> None:
    """Importances, scores and cosines against the formulas; who is ahead, by what was found."""
    importance, score, cosine = got
    kinds = (torch.float64, given[0].dtype)
    (exact, alike), own = ([*formulas(case, *(t if t is None else t.to(kind) for t in given))]
                           for kind in kinds)  # fmt: skip

    def near(got: Tensor, exact: Tensor, own: Tensor, where: Tensor | bool = True) -> bool:
        got, exact, own = (torch.where(torch.as_tensor(where, device=got.device), t, 0.0)
                           for t in (got, exact, own))  # fmt: skip
        return distance(got, exact) <= max(2 * distance(own, exact), FLOOR[given[0].dtype])

    assert {t.dtype for t in got} == {torch.float32}
    assert near(importance, exact, own[0])
    position = torch.arange(case.m, device=score.device)
    theirs, mine = importance[:, None, :], importance[:, :, None]
    ahead = (theirs > mine) | ((theirs == mine) & (position < position[:, None]))
    ahead &= position >= case.prefix
    assert (cosine[~ahead] == -1).all() and near(cosine, alike, own[1], ahead)
    candidate = ahead.sum(2) >= case.m - case.prefix - case.some
    assert candidate[:, case.prefix :].sum(1).eq(case.some).all()
    assert (score[~candidate] == math.inf).all()
    found = [i.sqrt() * (1 - c.masked_fill(~ahead, -1).amax(2)) for i, c in ((exact, alike), own)]
    assert near(score, *found, candidate)


def scored(case: Case, x, q, kv, weight, bias, size) -> tuple[Tensor, Tensor, Tensor]:
    config = Config(case.tile, case.tile, min(case.tile, 32), 4, 2) if case.tile else None
    key_bias = None if size is None else size.log()
    stats = kernels.row_stats(x)
    return kernels.absorb_scores(
        *(x, stats, q, kv, case.heads, case.prefix, case.some, weight, bias),
        eps=EPS,
        key_bias=key_bias,
        config=config,
    )


class TestScores:
    @dtypes
    @pytest.mark.parametrize("case", SCORED, ids=str)
    def test_err_no_more_than_torch(self, dtype, case):
        given = inputs(case, dtype)
        check_scored(case, given, scored(case, *given))

    @dtypes
    def test_every_image_by_itself(self, dtype):
        case = Case(63, 64, 1, 64, 3, 2, 2, True)
        given = inputs(case, dtype)
        together = scored(case, *given)
        for b in range(3):
            alone = scored(case, *(t[b : b + 1] if t.dim() > 1 else t for t in given))
            for one, all_of_them in zip(alone, together, strict=True):
                assert torch.equal(one[0], all_of_them[b])

    @dtypes
    def test_of_twins_the_first_stands_for_the_others(self, dtype):
        case = Case(17, 64, 2, 32, 1)
        x, q, kv, *rest = inputs(case, dtype)
        for tensor in (x, kv):
            tensor[:, 9:] = tensor[:, 8:9]
        importance, score, _ = scored(case, x, q, kv, *rest)
        assert (importance[:, 9:] == importance[:, 8:9]).all()
        assert (score[:, 9:] < 1e-3 * importance[:, 9:].sqrt()).all()
        assert (score[:, 8] > 1e-2 * importance[:, 8].sqrt()).all()
        x[:, 3] = 2 * x[:, 8]  # the same after the norm, but for eps
        kv[:, 3] = kv[:, 8]
        kv[:, 3, 64:] *= 4
        importance, score, _ = scored(case, x, q, kv, *rest)
        assert (importance[:, 3] > importance[:, 8]).all()
        assert (score[:, 8:] < 1e-3 * importance[:, 8:].sqrt()).all()

    @dtypes
    def test_nan_stays_in_its_image(self, dtype):
        case = Case(17, 64, 2, 32, 3, sized=True)
        given = inputs(case, dtype)
        wanted = scored(case, *given)
        given[0][1, 3, 7] = given[2][1, 3, 7] = math.nan
        got = scored(case, *given)
        assert got[0][1].isnan().all()
        assert got[1][1].isnan().all()
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one[::2], other[::2])


def chosen(scores: Tensor, n: int, prefix: int) -> list[list[int]]:
    """By sorting."""
    rows = []
    for row in scores.tolist():
        row = [-math.inf if math.isnan(score) else score for score in row]
        order = sorted(range(prefix, len(row)), key=lambda i: -row[i])
        rows.append(sorted([*range(prefix), *order[: n - prefix]]))
    return rows


def received(cosine: Tensor, index: list[list[int]], prefix: int) -> list[list[int]]:
    """Which of the kept each token goes into, token by token."""
    rows = []
    for image, kept in zip(cosine.nan_to_num(-3).tolist(), index, strict=True):
        places = range(prefix, len(kept))
        rows.append(
            [
                kept.index(i) if i in kept else max(places, key=lambda k: row[kept[k]])
                for i, row in enumerate(image)
            ]
        )
    return rows


def hard_scores(batch: int, m: int, kind: str) -> Tensor:
    scores = Random(m)(batch, m)
    if kind == "ties":
        scores = (2 * scores).round() / 2  # both zeros among them
    elif kind == "nan":
        scores[:, ::3] = math.nan
        scores[:, 1::5] = -math.inf
        scores[:, 2::7] = math.inf
    elif kind == "equal":
        scores = torch.zeros_like(scores)
    elif kind == "tiny":
        scores = scores * 1e-41  # denormal
    return scores


CHOICES = [
    (1, 2, 2, 1),
    (3, 5, 3, 2),
    (3, 17, 6, 5),
    (1, 63, 62, 1),
    (3, 197, 150, 2),
    (1, 257, 30, 5),
    (1, 577, 300, 1),
    (1, 1025, 800, 1),
]


@pytest.mark.parametrize("kind", ["", "ties", "nan", "equal", "tiny"])
@pytest.mark.parametrize(("batch", "m", "n", "prefix"), CHOICES)
def test_top_tokens(batch, m, n, prefix, kind):
    scores = hard_scores(batch, m, kind)
    got = kernels.top_tokens(scores, n, prefix)
    assert got.dtype == torch.int64
    assert got.tolist() == chosen(scores, n, prefix)


@dtypes
@pytest.mark.parametrize(("batch", "m", "n", "prefix"), CHOICES[1:7])
@pytest.mark.parametrize("channels", [16, 48])
def test_top_tokens_of_what_predicts_them(dtype, batch, m, n, prefix, channels):
    random = Random(m)
    hidden, weight = random(batch, m, channels, dtype=dtype), random(channels)
    exact = (hidden.double() @ weight.double()).sort(1).values
    # No two scores are so near to each other that float32 could take one for the other.
    assert (exact.diff(dim=1).min() / exact.abs().max()) > 1e-7
    got = kernels.top_tokens(hidden, n, prefix, weight=weight)
    assert got.tolist() == chosen(hidden.double() @ weight.double(), n, prefix)


SELECTIONS = [(kind, *choice) for kind in ("", "ties", "nan") for choice in CHOICES[:4]]
SELECTIONS += [("", *CHOICES[5]), ("ties", *CHOICES[4]), ("nan", *CHOICES[6])]


@pytest.mark.parametrize(("kind", "batch", "m", "n", "prefix"), SELECTIONS)
def test_select(kind, batch, m, n, prefix):
    check_select(kernels.absorb_select, kind, batch, m, n, prefix)


def check_select(select, kind, batch, m, n, prefix):
    """A back end's `absorb_select` against loops, on scores and cosines that make it hard."""
    scores, random = hard_scores(batch, m, kind), Random(m + 1)
    cosine = random(batch, m, m).tanh()
    if kind == "ties":
        cosine = (3 * cosine).round() / 3
    if kind == "nan":
        cosine[:, :, ::4] = math.nan
        cosine[:, 1] = math.nan
    index, into = select(scores, cosine, n, prefix)
    kept = chosen(scores, n, prefix)
    assert (index.dtype, into.dtype) == (torch.int64, torch.int32)
    assert index.tolist() == kept
    assert into.tolist() == received(cosine, kept, prefix)


MERGED = [
    (1, 2, 1, 64, 0),
    (3, 5, 3, 48, 1),
    (3, 63, 40, 64, 2),
    (1, 63, 2, 192, 1),
    (1, 197, 150, 192, 1),
    (1, 257, 200, 384, 5),
    (1, 577, 90, 64, 2),
]


class Several(NamedTuple):
    """What tokens stand for: their sizes and spreads, [B, m] each; None where for themselves."""

    size: Tensor | None = None
    spread: Tensor | None = None


def merging(batch: int, m: int, n: int, width: int, prefix: int, dtype: torch.dtype) -> tuple:
    """x, importances, which are kept, and where the others go, nowhere twice in three."""
    random = Random(m)
    index = random.index(batch, n - prefix, m - prefix).sort(1).values + prefix
    first = torch.arange(prefix, device=DEVICE).expand(batch, -1)
    index = torch.cat([first, index], 1)
    into = random.index(batch, m, 3 * m) % n // 3 * 3
    into = into.clamp(min=prefix).scatter(1, index, torch.arange(n, device=DEVICE).expand(batch, n))
    importance = random(batch, m).abs()
    importance[:, ::4] = 0
    x = random(batch, m, width, dtype=dtype)
    x[:, 1::2] = (x[:, 1::2] + 4).to(dtype)  # their means count for nothing in the variances
    return x, importance, index, into.int()


def several(batch: int, m: int) -> Several:
    """Every third token stands for itself alone."""
    random = Random(m + 1)
    size, spread = 1 + (3 * random(batch, m).abs()).round(), random(batch, m).square()
    size[:, ::3], spread[:, ::3] = 1, 0
    return Several(size, spread)


def given(case: tuple, dtype: torch.dtype, again: bool) -> tuple:
    """What `merge` and the reference take; `again`: tokens stand for several already."""
    return *merging(*case, dtype), several(*case[:2]) if again else Several()


def merge(
    x: Tensor,
    importance: Tensor,
    index: Tensor,
    into: Tensor,
    of: Several,
    kernels: ModuleType = kernels,
) -> tuple[Tensor, ...]:
    stats = stats_of(x, of.spread)
    return kernels.absorb_merge(x, stats, importance, index, into, **of._asdict())


def merged(x: Tensor, importance: Tensor, index: Tensor, into: Tensor, of: Several) -> Alive:
    """The reference's answer."""
    batch, m, _ = x.shape
    away = torch.ones(batch, m, dtype=torch.bool, device=x.device).scatter(1, index, False)
    place = torch.arange(m, device=x.device).expand(batch, -1)
    choice = Choice(index, into.long()[away].view(batch, -1), importance.clamp(min=1e-20))
    return absorb_tokens(Alive(x.transpose(0, 1), place, of.size, spread=of.spread), choice)


def alone(index: Tensor, into: Tensor) -> Tensor:
    """Which of the kept nothing goes into."""
    ones = torch.ones(into.shape, device=into.device)
    return torch.zeros(index.shape, device=into.device).scatter_add(1, into.long(), ones) == 1


def check_merged(kernels: ModuleType, x: Tensor, *rest: Tensor | Several) -> None:
    """A back end's `absorb_merge` against the reference; `rest` as for `merge`."""
    out, stats, size, bias, spread = merge(x, *rest, kernels=kernels)
    dtype = x.dtype
    wanted, own = (merged(x.to(kind), *rest) for kind in (torch.float64, dtype))
    exact = wanted.x.transpose(0, 1)
    assert out.dtype == dtype
    assert distance(out, exact) <= max(2 * distance(own.x.transpose(0, 1), exact), FLOOR[dtype])
    check_stats(stats, out, spread)
    torch.testing.assert_close(size, wanted.size, rtol=1e-6, atol=0)
    torch.testing.assert_close(bias, size.log(), rtol=1e-6, atol=1e-7)
    assert spread.dtype == torch.float32
    # It is what is left of a variance, which is that of a row as rounded.
    moment = wanted.spread + exact.float().var(-1, correction=0)
    assert ((spread - wanted.spread).abs() <= 4 * torch.finfo(dtype).eps * moment).all()


@pytest.mark.parametrize("again", [False, True])
class TestMerge:
    """`again`: tokens stand for several already."""

    @dtypes
    @pytest.mark.parametrize("case", MERGED, ids=str)
    def test_errs_no_more_than_torch(self, dtype, case, again):
        check_merged(kernels, *given(case, dtype, again))

    @dtypes
    def test_a_token_that_nothing_goes_into_stays_as_it_is(self, dtype, again):
        x, importance, index, into, of = given((3, 63, 40, 48, 2), dtype, again)
        out, stats, size, _, spread = merge(x, importance, index, into, of)
        stays = alone(index, into)
        assert 20 < stays.sum() < 100
        before = x.gather(1, index[..., None].expand(-1, -1, 48))
        assert torch.equal(out[stays], before[stays])
        assert not torch.equal(out[~stays], before[~stays])
        held = stats_of(x, of.spread).flatten(2).gather(1, index[..., None].expand(-1, -1, 6))
        assert torch.equal(stats.flatten(2)[stays], held[stays])
        ones, none = torch.ones(3, 63, device=DEVICE), torch.zeros(3, 63, device=DEVICE)
        for got, old in zip((size, spread), of if again else (ones, none), strict=True):
            assert torch.equal(got[stays], old.gather(1, index)[stays])
        assert (size[~stays] > 1).all()
        assert (spread[~stays] > 0.1).sum() > 0.5 * (~stays).sum()

    @dtypes
    def test_every_image_by_itself(self, dtype, again):
        *tensors, of = given((3, 63, 40, 48, 2), dtype, again)
        together = merge(*tensors, of)
        for b in range(3):
            own = Several(*(None if t is None else t[b : b + 1].contiguous() for t in of))
            for one, all_of_them in zip(
                merge(*(t[b : b + 1].contiguous() for t in tensors), own), together, strict=True
            ):
                assert torch.equal(one[0], all_of_them[b])

    @dtypes
    def test_nan_stays_with_those_that_it_goes_into(self, dtype, again):
        x, importance, index, into, of = given((3, 63, 40, 48, 2), dtype, again)
        wanted = merge(x, importance, index, into, of)
        x[1, 62] = math.nan
        got = merge(x, importance, index, into, of)
        hit = into[1, 62].item()
        assert got[0][1, hit].isnan().all()
        others = torch.ones(3, 40, dtype=torch.bool, device=DEVICE)
        others[1, hit] = False
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one[others], other[others])

    @dtypes
    def test_tokens_that_cancel_and_tokens_that_matter_nothing(self, dtype, again):
        x = torch.ones(1, 4, 64, device=DEVICE, dtype=dtype)
        x[:, 2] = -1
        x[:, 3] = 3
        x[..., ::2] *= -1
        index, into = torch.tensor([[0, 1]], device=DEVICE), torch.tensor([[0, 1, 1, 1]])
        given = index, into.int().to(DEVICE), several(1, 4) if again else Several()
        importance = torch.tensor([[1.0, 1.0, 1.0, 0.0]], device=DEVICE)
        out, *_, spread = merge(x, importance, *given)
        torch.testing.assert_close(out[:, 1], torch.zeros_like(out[:, 1]), rtol=0, atol=1e-19)
        before = given[2].spread[0, 1:3].mean() if again else 0.0
        torch.testing.assert_close(spread[0, 1].item(), 1.0 + float(before), rtol=1e-6, atol=0)
        out, *_, spread = merge(x, torch.zeros(1, 4, device=DEVICE), *given)
        assert torch.equal(out[:, 0], x[:, 0])
        torch.testing.assert_close(out[:, 1], x[:, 1])
        before = given[2].spread[0, 1:].mean() if again else 0.0
        torch.testing.assert_close(spread[0, 1].item(), 8 / 3 + float(before), rtol=1e-3, atol=0)


@dtypes
def test_the_spread_is_that_of_all_members(dtype):
    """Also where they come one after the other; that of twins is none."""
    x = Random()(1, 5, 64, dtype=dtype)
    weight = torch.tensor([[1.0, 1.0, 2.0, 0.5, 0.25]], device=DEVICE)
    one_by_one = [
        (torch.tensor([[0, 1, 3]]), torch.tensor([[0, 1, 1, 2, 2]])),
        (torch.tensor([[0, 1]]), torch.tensor([[0, 1, 1]])),
    ]
    at_once = [(torch.tensor([[0, 1]]), torch.tensor([[0, 1, 1, 1, 1]]))]

    def result(x: Tensor, stages: list) -> Tensor:
        stats, mass, of = kernels.row_stats(x), weight, Several()
        for index, into in stages:
            index, into = index.to(DEVICE), into.int().to(DEVICE)
            x, stats, size, _, spread = kernels.absorb_merge(
                x, stats, mass, index, into, **of._asdict()
            )
            mass = torch.zeros_like(size).scatter_add(1, into.long(), mass)
            of = Several(size, spread)
        assert of.size.tolist() == [[1, 4]]
        assert of.spread[0, 0] == 0
        return of.spread[0, 1].double()

    members = x[0, 1:].double()
    members = members - members.mean(1, keepdim=True)
    share = (weight[0, 1:, None] / weight[0, 1:].sum()).double()
    wanted = (share * (members - (share * members).sum(0)).square()).sum(0).mean()
    for stages in (at_once, one_by_one):
        near = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 0}
        torch.testing.assert_close(result(x, stages), wanted, **near)
        twins = x[:, 1:2].expand(-1, 5, -1).contiguous()
        assert 0 <= result(twins, stages) < 1e-6
