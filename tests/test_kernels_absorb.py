"""Triton's importances, scores and averages: what absorbs what."""

import math

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
    merge,
    several,
    without_variance,
)
from kernel_checks import (
    DEVICE,
    DTYPES,
    EPS,
    Random,
    kernels,
    stats_of,
)
from torch import Tensor

from slimvit.kernels import Config

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.usefixtures("poison_empty")


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
    def test_what_is_hardly_read_does_not_matter_at_all(self, dtype):
        case = Case(63, 64, 1, 64, sharpness=40.0)
        importance, _, _ = scored(case, *inputs(case, dtype))
        assert (importance == 0).any() and (importance > 0).sum() > 9
        assert (importance[importance > 0] > 2.4e-38).all()  # values are longer than one

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
    def test_tokens_that_the_norm_makes_zeros_of(self, dtype):
        case = Case(17, 64, 2, 32, 1)
        given = without_variance(case, dtype)
        check_scored(case, given, scored(case, *given))

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
    """Also where they come one after the other."""
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


@dtypes
def test_the_spread_of_twins_is_none(dtype):
    check_twins(kernels, 8, dtype)
