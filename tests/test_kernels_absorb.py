"""Triton's choice of tokens: importances, scores, the highest of them, and what absorbs what."""

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, DTYPES, EPS, FLOOR, Random, check_stats, distance, kernels
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
    found = [i * (1 - c.masked_fill(~ahead, -1).amax(2)) for i, c in ((exact, alike), own)]
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
        assert (score[:, 9:] < 1e-3 * importance[:, 9:]).all()
        assert (score[:, 8] > 1e-2 * importance[:, 8]).all()
        x[:, 3] = 2 * x[:, 8]  # the same after the norm, but for eps
        kv[:, 3] = kv[:, 8]
        kv[:, 3, 64:] *= 4
        importance, score, _ = scored(case, x, q, kv, *rest)
        assert (importance[:, 3] > importance[:, 8]).all()
        assert (score[:, 8:] < 1e-3 * importance[:, 8:]).all()

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
    size = None if kind == "nan" else 1 + random(batch, m).abs()
    index, into, gain = select(scores, cosine, n, prefix, size=size)
    kept = chosen(scores, n, prefix)
    assert (index.dtype, into.dtype, gain.dtype) == (torch.int64, torch.int32, torch.float32)
    assert index.tolist() == kept
    assert into.tolist() == received(cosine, kept, prefix)
    greatest = cosine.gather(2, index.gather(1, into.long())[..., None])[..., 0]
    wanted = greatest.nan_to_num(0).clamp(min=0).sqrt().scatter(1, index, 1.0)
    wanted = wanted if size is None else wanted * size
    torch.testing.assert_close(gain, wanted, rtol=1e-6, atol=0)


MERGED = [
    (1, 2, 1, 64, 0),
    (3, 5, 3, 48, 1),
    (3, 63, 40, 64, 2),
    (1, 63, 2, 192, 1),
    (1, 197, 150, 192, 1),
    (1, 257, 200, 384, 5),
    (1, 577, 90, 64, 2),
]


def merging(batch: int, m: int, n: int, width: int, prefix: int, dtype: torch.dtype) -> tuple:
    """x, importances, which are kept, and where the others go, nowhere twice in three."""
    random = Random(m)
    index = random.index(batch, n - prefix, m - prefix).sort(1).values + prefix
    first = torch.arange(prefix, device=DEVICE).expand(batch, -1)
    index = torch.cat([first, index], 1)
    into = random.index(batch, m, 3 * m) % n // 3 * 3
    into = into.clamp(min=prefix).scatter(1, index, torch.arange(n, device=DEVICE).expand(batch, n))
    gain, importance = random(batch, m).abs() + 0.5, random(batch, m).abs()
    importance[:, ::4] = 0
    x = random(batch, m, width, dtype=dtype)
    return x, importance, index, into.int(), gain


def merged(x: Tensor, importance: Tensor, index: Tensor, into: Tensor, gain: Tensor) -> Alive:
    """The reference's answer."""
    batch, m, _ = x.shape
    away = torch.ones(batch, m, dtype=torch.bool, device=x.device).scatter(1, index, False)
    pruned = [t[away].view(batch, -1) for t in (into.long(), gain)]
    place = torch.arange(m, device=x.device).expand(batch, -1)
    choice = Choice(index, pruned[0], importance.clamp(min=1e-20), pruned[1])
    own = torch.ones_like(gain).scatter(1, index, gain.gather(1, index))
    return absorb_tokens(Alive(x.transpose(0, 1), place, own), choice)


class TestMerge:
    @dtypes
    @pytest.mark.parametrize("case", MERGED, ids=str)
    def test_errs_no_more_than_torch(self, dtype, case):
        x, *rest = merging(*case, dtype)
        out, stats, size, bias = kernels.absorb_merge(x, *rest)
        wanted, own = (merged(x.to(kind), *rest) for kind in (torch.float64, dtype))
        exact = wanted.x.transpose(0, 1)
        assert out.dtype == dtype
        assert distance(out, exact) <= max(2 * distance(own.x.transpose(0, 1), exact), FLOOR[dtype])
        check_stats(stats, out)
        torch.testing.assert_close(size, wanted.size, rtol=1e-6, atol=0)
        torch.testing.assert_close(bias, size.log(), rtol=1e-6, atol=1e-7)

    @dtypes
    def test_a_token_that_nothing_goes_into_stays_as_it_is(self, dtype):
        x, importance, index, into, gain = merging(3, 63, 40, 48, 2, dtype)
        out, _, size, _ = kernels.absorb_merge(x, importance, index, into, gain)
        counts = torch.zeros(3, 40, device=DEVICE)
        counts.scatter_add_(1, into.long(), torch.ones_like(gain))
        alone = counts == 1
        assert 20 < alone.sum() < 100
        before = x.gather(1, index[..., None].expand(-1, -1, 48))
        assert torch.equal(out[alone], before[alone])
        assert torch.equal(size[alone], gain.gather(1, index)[alone])
        assert not torch.equal(out[~alone], before[~alone])

    @dtypes
    def test_every_image_by_itself(self, dtype):
        given = merging(3, 63, 40, 48, 2, dtype)
        together = kernels.absorb_merge(*given)
        for b in range(3):
            alone = kernels.absorb_merge(*(t[b : b + 1].contiguous() for t in given))
            for one, all_of_them in zip(alone, together, strict=True):
                assert torch.equal(one[0], all_of_them[b])

    @dtypes
    def test_tokens_that_cancel_and_tokens_that_matter_nothing(self, dtype):
        x = torch.ones(1, 4, 64, device=DEVICE, dtype=dtype)
        x[:, 2] = -1
        x[:, 3] = 3
        index, into = torch.tensor([[0, 1]], device=DEVICE), torch.tensor([[0, 1, 1, 1]])
        given = (index, into.int().to(DEVICE), torch.ones(1, 4, device=DEVICE))
        importance = torch.tensor([[1.0, 1.0, 1.0, 0.0]], device=DEVICE)
        out, *_ = kernels.absorb_merge(x, importance, *given)
        assert out.isfinite().all()
        out, *_ = kernels.absorb_merge(x, torch.zeros(1, 4, device=DEVICE), *given)
        assert torch.equal(out[:, 0], x[:, 0])
        torch.testing.assert_close(out[:, 1], torch.full_like(out[:, 1], 5 / 3))
