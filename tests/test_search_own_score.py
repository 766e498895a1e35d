"""Scores of one's own: what they may do, and what is refused."""

import functools

import numpy as np
import pytest
import torch
from test_search import quick

from slimvit.errors import SearchError, SlimvitError


def test_own_score_is_one_function(tiny_vit, batches):
    def middle(view):
        wanted = torch.arange(view.paths.shape[1]).sub(8).abs()
        return torch.exp(-wanted.double()).expand(len(view.paths), -1)

    for score in (middle, functools.partial(middle)):
        masks = quick(tiny_vit, batches, counts=(6, 6, 6, 6, 6, 1), score=score).masks
        assert masks.keep[0].nonzero().squeeze(1).tolist() == [0, 6, 7, 8, 9, 10]


def test_wrong_score_is_named(tiny_vit, batches):
    with pytest.raises(
        SlimvitError, match=r"a score must be a tensor \[b, N\] = \[3, 17\], got \[3, 16\]"
    ):
        quick(tiny_vit, batches, tolerance=0.1, score=lambda v: v.paths[:, 1:])
    for other, got in ((None, "NoneType"), ([1.0], "list"), (np.ones((3, 17)), "ndarray")):
        with pytest.raises(SearchError, match=rf"tensor \[b, N\] = \[3, 17\], got {got}"):
            quick(tiny_vit, batches, tolerance=0.1, score=lambda v, other=other: other)
    with pytest.raises(SearchError, match="of real numbers, got torch.complex64"):
        quick(tiny_vit, batches, tolerance=0.1, score=lambda v: v.paths + 0j)
    with pytest.raises(SlimvitError, match="scores must be finite"):
        quick(tiny_vit, batches, tolerance=0.1, score=lambda v: v.paths / 0 * 0)
    for bad in (lambda v: v.paths * 0, lambda v: -v.paths):
        with pytest.raises(SlimvitError, match="not negative and not all zero, those of block 5"):
            quick(tiny_vit, batches, tolerance=0.1, score=bad)


def spreads(view):
    x = view.inputs - view.inputs.mean(1, keepdim=True)
    return x.norm(dim=-1)


def spreads_in_place(view):
    for given in view[1:4]:
        given.sub_(given.mean(1, keepdim=True))
    return view.inputs.norm(dim=-1)


def test_a_score_may_write_to_what_it_is_given(tiny_vit, batches):
    wanted = quick(tiny_vit, batches, tolerance=0.05, score=spreads).masks
    got = quick(tiny_vit, batches, tolerance=0.05, score=spreads_in_place).masks
    assert torch.equal(got.keep, wanted.keep)
    assert torch.equal(got.errors, wanted.errors) and torch.equal(got.scores, wanted.scores)


@pytest.mark.parametrize("scale", [1e37, 1e-37])
def test_scores_of_any_finite_size(tiny_vit, batches, scale):
    wanted = quick(tiny_vit, batches, tolerance=0.05, score=spreads).masks
    got = quick(tiny_vit, batches, tolerance=0.05, score=lambda v: spreads(v) * scale).masks
    assert torch.equal(got.keep, wanted.keep)
    torch.testing.assert_close(got.scores, wanted.scores)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda values: values.to_sparse(), "sparse_coo"),
        (lambda values: torch.nested.as_nested_tensor(list(values)), "nested"),
        (lambda values: values.to("meta"), "meta"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_scores_that_are_no_plain_numbers(tiny_vit, batches, change, kind):
    with pytest.raises(SearchError, match=f"a dense tensor with values, got a {kind} one"):
        quick(tiny_vit, batches, tolerance=0.1, score=lambda view: change(view.paths))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.bool, torch.float16])
def test_scores_of_any_dtype(tiny_vit, batches, dtype):
    options = {"counts": (12, 12, 9, 9, 5, 1)}

    def steps(view):
        return (view.inputs.norm(dim=-1).argsort(1) % 4).float()

    wanted = quick(tiny_vit, batches, score=lambda v: steps(v).to(dtype).float(), **options).masks
    got = quick(tiny_vit, batches, score=lambda v: steps(v).to(dtype), **options).masks
    assert torch.equal(got.keep, wanted.keep) and torch.equal(got.scores, wanted.scores)
