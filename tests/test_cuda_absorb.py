"""The CUDA kernels that choose tokens, emulated; cases and references are those of Triton's."""

import functools
import math

import absorb_checks
import pytest
import torch
from absorb_checks import (
    MERGED,
    SCORED,
    Case,
    Several,
    alone,
    check_merged,
    check_scored,
    check_twins,
    given,
    inputs,
    several,
    without_variance,
)
from choice_checks import CHOICES, check_select, chosen, hard_scores
from cuda_checks import all_devices, devices, kernels, use
from emulated import A100, T4
from kernel_checks import EPS, Random, stats_of
from torch import Tensor

from slimvit.backends.cuda_choosing import MOST_TOKENS
from slimvit.errors import SlimvitError

pytestmark = pytest.mark.usefixtures("emulated_cuda", "poison_empty")
HALF = A100._replace(dtype=torch.float16)


def scored(case: Case, x, q, kv, weight, bias, size) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.absorb_scores(
        *(x, kernels.row_stats(x), q, kv, case.heads, case.prefix, case.some, weight, bias),
        eps=EPS,
        key_bias=None if size is None else size.log(),
    )


def check_scores(case: Case, dtype: torch.dtype) -> None:
    given = inputs(case, dtype)
    check_scored(case, given, scored(case, *given))


class TestScores:
    @devices
    @pytest.mark.parametrize("case", SCORED, ids=str)
    def test_err_no_more_than_torch(self, device, case):
        check_scores(case, use(device))

    @all_devices
    @pytest.mark.parametrize(
        "case",
        [
            Case(33, 64, 2, 32, 2, prefix=5),
            Case(61, 72, 2, 24, 34, 2, 2, True, candidates=17),  # many images: larger tiles
        ],
        ids=str,
    )
    def test_tiles_of_both_sizes(self, device, case):
        check_scores(case, use(device))

    @devices
    def test_many_tiles(self, device):
        check_scores(Case(97, 136, 1, 8, 22), use(device))

    def test_many_tokens(self):
        check_scores(Case(1025, 64, 1, 8, sized=True), use(A100))

    @pytest.mark.parametrize("case", SCORED[:4], ids=str)
    def test_float16_on_newer_cores(self, case):
        check_scores(case, use(HALF))

    @devices
    def test_what_is_hardly_read_does_not_matter_at_all(self, device):
        case = Case(63, 64, 1, 64, sharpness=40.0)
        importance, _, _ = scored(case, *inputs(case, use(device)))
        assert (importance == 0).any() and (importance > 0).sum() > 9
        assert (importance[importance > 0] > 2.4e-38).all()  # values are longer than one

    @devices
    def test_every_image_by_itself_and_among_many(self, device):
        """The tiles differ, the answers do not."""
        case = Case(63, 64, 1, 64, 40, 2, 2, True)
        given = inputs(case, use(device))
        together = scored(case, *given)
        for b in (0, 17, 39):
            alone = scored(case, *(t[b : b + 1] if t.dim() > 1 else t for t in given))
            for one, all_of_them in zip(alone, together, strict=True):
                assert torch.equal(one[0], all_of_them[b])

    @devices
    def test_of_twins_the_first_stands_for_the_others(self, device):
        case = Case(17, 64, 2, 32, 1)
        x, q, kv, *rest = inputs(case, use(device))
        for tensor in (x, kv):
            tensor[:, 9:] = tensor[:, 8:9]
        importance, score, _ = scored(case, x, q, kv, *rest)
        assert (importance[:, 9:] == importance[:, 8:9]).all()
        assert (score[:, 9:].abs() < 1e-3 * importance[:, 9:].sqrt()).all()
        assert (score[:, 8] > 1e-2 * importance[:, 8].sqrt()).all()
        x[:, 3], kv[:, 3] = x[:, 8], kv[:, 8]
        kv[:, 3, 64:] *= 4
        importance, score, _ = scored(case, x, q, kv, *rest)
        assert (importance[:, 3] > importance[:, 8]).all()
        assert (score[:, 8:].abs() < 1e-5 * importance[:, 8:].sqrt()).all()

    @devices
    def test_tokens_that_the_norm_makes_zeros_of(self, device):
        case = Case(17, 64, 2, 32, 1)
        given = without_variance(case, use(device))
        check_scored(case, given, scored(case, *given))

    @devices
    def test_nan_stays_in_its_image(self, device):
        case = Case(17, 64, 2, 32, 3, sized=True)
        given = inputs(case, use(device))
        wanted = scored(case, *given)
        given[0][1, 3, 7] = given[2][1, 3, 7] = math.nan
        got = scored(case, *given)
        assert got[0][1].isnan().all()
        assert got[1][1].isnan().all()
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one[::2], other[::2])


@pytest.mark.parametrize("kind", ["", "ties", "nan", "equal", "tiny"])
@pytest.mark.parametrize(("batch", "m", "n", "prefix"), CHOICES)
def test_top_tokens(batch, m, n, prefix, kind):
    use(T4)
    values = hard_scores(batch, m, kind)
    got = kernels.top_tokens(values, n, prefix)
    assert got.dtype == torch.int64
    assert got.tolist() == chosen(values, n, prefix)


@pytest.mark.parametrize(("m", "n", "prefix"), [(1, 1, 1), (7, 7, 1), (7, 2, 5), (7, 5, 5)])
def test_top_tokens_with_nothing_to_choose(m, n, prefix):
    got = kernels.top_tokens(hard_scores(2, m, "nan"), n, prefix)
    assert got.tolist() == [list(range(n))] * 2


@devices
@pytest.mark.parametrize(("batch", "m", "n", "prefix"), CHOICES[1:7])
@pytest.mark.parametrize("channels", [16, 48])
def test_top_tokens_of_what_predicts_them(device, batch, m, n, prefix, channels):
    random, dtype = Random(m), use(device)
    hidden, weight = random(batch, m, channels, dtype=dtype), random(channels)
    exact = (hidden.double() @ weight.double()).sort(1).values
    assert (exact.diff(dim=1).min() / exact.abs().max()) > 1e-7
    got = kernels.top_tokens(hidden, n, prefix, weight=weight)
    assert got.tolist() == chosen(hidden.double() @ weight.double(), n, prefix)


@pytest.mark.parametrize("kind", ["", "ties", "nan"])
@pytest.mark.parametrize(("batch", "m", "n", "prefix"), CHOICES)
def test_select(batch, m, n, prefix, kind):
    use(A100)
    check_select(kernels.absorb_select, kind, batch, m, n, prefix)


merge = functools.partial(absorb_checks.merge, kernels=kernels)


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
class TestMerge:
    @devices
    @pytest.mark.parametrize("case", [*MERGED, (1, 17, 5, 1032, 1), (3, 7, 4, 1536, 2)], ids=str)
    def test_errs_no_more_than_torch(self, device, case, again):
        check_merged(kernels, *given(case, use(device), again))

    @devices
    @pytest.mark.parametrize("case", [*MERGED, (1, 17, 5, 1032, 1), (3, 7, 4, 1536, 2)], ids=str)
    def test_the_spread_is_what_variances_lose(self, device, case, again):
        x, importance, index, into, of = given(case, use(device), again)
        out, *_, size, _, spread = merge(x, importance, index, into, of)
        weight, into = importance.double().clamp(min=1e-20), into.long()
        moment = x.double().var(-1, correction=0) + (of.spread if again else 0)
        total, sums = (
            torch.zeros(index.shape, dtype=torch.float64).scatter_add(1, into, values)
            for values in (weight, weight * moment)
        )
        # Of the rows as they were rounded, so that norms see the members' mean variance.
        wanted = sums / total - out.double().var(-1, correction=0)
        stays = alone(index, into)
        close = (spread - wanted.clamp(min=0)).abs() <= 3e-6 * sums / total
        assert close[~stays].all()
        assert wanted[~stays].max() > 0.1 or case[1] == 2  # where one of the two weighs nothing
        assert torch.equal(
            spread[stays], (of.spread.gather(1, index) if again else 0 * size)[stays]
        )

    @devices
    def test_a_token_that_nothing_goes_into_stays_as_it_is(self, device, again):
        """To the bit, whatever the values."""
        x, importance, index, into, of = given((3, 63, 40, 48, 2), use(device), again)
        noise = torch.randint(-(2**15), 2**15, x.shape, dtype=torch.int16)
        odd = torch.randperm(63)[:9]
        bits = x.view(torch.int16)  # other copies turn one NaN into another
        bits[:, odd] = noise[:, odd]  # NaN, infinities and denormals among them
        stats = torch.randint(-(2**31), 2**31 - 1, (3, 63, 3, 2), dtype=torch.int32)
        out, out_stats, *rest = kernels.absorb_merge(
            x, stats.view(torch.float32), importance, index, into, **of._asdict()
        )
        stays = alone(index, into)
        assert 20 < stays.sum() < 100

        def before(rows: Tensor) -> Tensor:
            return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))

        out, out_stats = out.view(torch.int16), out_stats.view(torch.int32).flatten(2)
        assert torch.equal(out[stays], before(bits)[stays])
        assert torch.equal(out_stats[stays], before(stats.flatten(2))[stays])
        size, _, spread = rest
        olds = of if again else (torch.ones(3, 63), torch.zeros(3, 63))
        for new, old in zip((size, spread), olds, strict=True):
            assert torch.equal(new[stays], old.gather(1, index)[stays])
        assert not torch.equal(out[~stays], before(bits)[~stays])
        assert (size[~stays] > 1).all()

    @devices
    def test_every_image_by_itself(self, device, again):
        *tensors, of = given((3, 63, 40, 48, 2), use(device), again)
        together = merge(*tensors, of)
        for b in range(3):
            own = Several(*(None if t is None else t[b : b + 1].contiguous() for t in of))
            by_itself = merge(*(t[b : b + 1].contiguous() for t in tensors), own)
            for one, all_of_them in zip(by_itself, together, strict=True):
                assert torch.equal(one[0], all_of_them[b])

    @devices
    def test_nan_stays_with_those_that_it_goes_into(self, device, again):
        x, importance, index, into, of = given((3, 63, 40, 48, 2), use(device), again)
        wanted = merge(x, importance, index, into, of)
        x[1, 62] = math.nan
        got, hit = merge(x, importance, index, into, of), into[1, 62].item()
        assert got[0][1, hit].isnan().all()
        assert got[1][1, hit].isnan().all()
        others = torch.ones(3, 40, dtype=torch.bool)
        others[1, hit] = False
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one[others], other[others])

    @devices
    def test_tokens_that_cancel_and_tokens_that_matter_nothing(self, device, again):
        x = torch.ones(1, 4, 64, dtype=use(device))
        x[..., ::2] = -1
        x[:, 2] *= -1
        x[:, 3] *= 3
        index, into = torch.tensor([[0, 1]]), torch.tensor([[0, 1, 1, 1]]).int()
        of = several(1, 4) if again else Several()
        out, *_, spread = merge(x, torch.tensor([[1.0, 1.0, 1.0, 0.0]]), index, into, of)
        assert (out[:, 1].float().abs() < 1e-15).all()
        before = of.spread[0, 1:3].mean().item() if again else 0.0
        assert spread[0, 1].item() == pytest.approx(1 + before, rel=1e-6)
        out, *_, spread = merge(x, torch.zeros(1, 4), index, into, of)
        assert torch.equal(out[:, 0], x[:, 0])
        torch.testing.assert_close(out[:, 1], x[:, 0])
        before = of.spread[0, 1:].mean().item() if again else 0.0
        assert spread[0, 1].item() == pytest.approx(8 / 3 + before, rel=1e-5)


@devices
def test_the_spread_of_twins_is_none(device):
    check_twins(kernels, 64, use(device))


def test_sizes_that_are_refused():
    dtype, random = use(T4), Random()
    x, wide = random(1, 3, 12, dtype=dtype), random(1, 3, 1544, dtype=dtype)
    q, kv, row, stats = x[:, :1, :8], x, random(12), random(1, 3, 1, 2)
    many, eight = torch.zeros(1, 2049), "must be a multiple of 8, got 12$"
    index, into = torch.arange(2)[None], torch.tensor([[0, 1, 1]]).int()
    wrong = {
        f"width {eight}": lambda: kernels.absorb_scores(
            x, stats, q, kv, 1, 1, 2, row, row, eps=EPS
        ),
        "width must be at most 1536, got 1544$": lambda: kernels.absorb_merge(
            wide, stats_of(wide), row[None, :3], index, into
        ),
        f"channels {eight}": lambda: kernels.top_tokens(x, 2, 1, weight=row),
        "it computes float16 and bfloat16, not float32": lambda: kernels.top_tokens(
            random(1, 3, 16), 2, 1, weight=random(16)
        ),
        "m must be at most 2048, got 2049$": lambda: kernels.top_tokens(many, 5, 1),
        "m must be at most 2048, got 2049$ ": lambda: kernels.absorb_select(many, many, 5, 1),
    }
    for message, call in wrong.items():
        with pytest.raises(SlimvitError, match=f"^back end cuda: {message.strip()}"):
            call()


def test_the_least_shared_memory_suffices():
    """For as many tokens as are taken, that of a T4."""
    dtype, random, m = use(T4), Random(), MOST_TOKENS
    x, q, kv = (random(1, *shape, dtype=dtype) for shape in ((m, 16), (1, 8), (m, 16)))
    weight, bias = random(16), random(16)
    importance, score, cosine = scored(Case(m, 16, 1, 8), x, q, kv, weight, bias, None)
    index, into = kernels.absorb_select(score, cosine, m // 2, 1)
    assert index.tolist() == chosen(score, m // 2, 1)
    out, _, size, _, spread = kernels.absorb_merge(x, stats_of(x), importance, index, into)
    assert out.isfinite().all()
    assert (spread >= 0).all()
    assert size.sum() == m
