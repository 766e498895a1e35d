"""Triton's selector: verdicts, scores, which patches are kept, and the package of the others."""

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from choice_checks import chosen, hard_scores
from kernel_checks import DTYPES, FLOOR, Random, check_stats, distance, kernels
from torch import Tensor

from slimvit.dynamic.selector import Selector
from slimvit.errors import SlimvitError
from slimvit.ops import AbsorbParts, SelectorParts, why_not_chosen
from slimvit.ops.fused_selector import fold_selector

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.usefixtures("poison_empty")


class Case(NamedTuple):
    """`n` of `p` patches are kept; `c` channels a head."""

    p: int
    n: int
    heads: int
    c: int
    batch: int = 1
    prefix: int = 1
    packages: int = 0

    def __str__(self) -> str:
        given = ((k, v) for k, v in self._asdict().items() if v != self._field_defaults.get(k))
        return ",".join(f"{k}={v}" for k, v in given)


CASES = [
    Case(2, 1, 1, 8),
    Case(5, 2, 3, 16, 3, 2, 1),
    Case(37, 30, 2, 40, 2, 5, 2),
    Case(64, 1, 1, 128),
    Case(97, 96, 3, 64, 1, 2, 3),
    Case(196, 137, 1, 64),
]
ODD = [Case(7, 3, 3, 5, 2), Case(5, 4, 2, 1, 1, 0)]  # rows that do not start at 16 bytes


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Selector]:
    """Alive tokens, and a selector whose weights every dtype holds."""
    random = Random(case.p)
    x = random(case.batch, case.prefix + case.p + case.packages, case.heads * case.c, dtype=dtype)
    selector = Selector(case.heads * case.c, case.heads).to(x.device)
    with torch.no_grad():
        for name, parameter in selector.named_parameters():
            noise = random(*parameter.shape)
            scale = 1.5 * parameter.shape[-2] ** -0.5 if name.endswith("weight") else 0.5
            value = 1 + 0.3 * noise if name == "norm_weight" else scale * noise
            parameter.copy_(value.bfloat16())
    return x, selector


def patches_of(case: Case, x: Tensor) -> Tensor:
    return x[:, case.prefix : case.prefix + case.p]


@torch.no_grad()
def exact_scores(case: Case, x: Tensor, selector: Selector, dtype: torch.dtype) -> Tensor:
    """By the reference in `dtype`: the logit of keeping less that of pruning."""
    logits = selector.to(dtype)(patches_of(case, x).to(dtype).transpose(0, 1))
    selector.float()
    return logits[..., 0] - logits[..., 1]


def check_scores(kernels, case: Case, dtype: torch.dtype, shift: float = 0.0) -> None:
    """A back end's scores against the reference's; `shift` is of the logits of heads' weights."""
    x, selector = inputs(case, dtype)
    selector.weigh2.bias.data += shift
    part, others = fold_selector(selector, dtype), (case.prefix, case.packages)
    verdict, weight = kernels.selector_judge(x, *part, *others, eps=1e-6)
    score, _, _ = kernels.selector_choose(verdict, weight, case.n, *others)
    exact, own = (exact_scores(case, x, selector, kind) for kind in (torch.float64, dtype))
    assert score.dtype == torch.float32
    assert distance(score, exact) <= max(2 * distance(own, exact), FLOOR[dtype])


@dtypes
@pytest.mark.parametrize("case", CASES + ODD, ids=str)
def test_scores_err_no_more_than_torch(dtype, case):
    check_scores(kernels, case, dtype)


@dtypes
def test_scores_where_all_heads_count_for_next_to_nothing(dtype):
    check_scores(kernels, CASES[1], dtype, -128.0)


HARD = [(1, 2, 1, 1, 0), (3, 17, 6, 5, 1), (2, 63, 62, 2, 3), (1, 257, 30, 1, 2)]


def check_choose(choose, kind: str, batch: int, p: int, n: int, prefix: int, packages: int) -> None:
    """A back end's `selector_choose` by sorting, on scores that make it hard."""
    score = hard_scores(batch, p, "" if kind == "far" else kind)
    if kind == "far":
        score = 50 * score - 500  # what is kept of it by exp(score) is zero
    none = torch.zeros_like(score)
    verdict = torch.stack([2 * score, none, none + 9], 1)
    weight = torch.tensor([-99.0, -99.0, -999.0], device=score.device)  # exact in the mean
    weight = weight[:, None].expand(batch, 3, p).contiguous()
    got, share, index = choose(verdict, weight, n, prefix, packages)
    m = prefix + p + packages
    wanted = [
        [*range(prefix), *(prefix + i for i in row), *range(prefix + p, m + 1)]
        for row in chosen(score, n, 0)
    ]
    assert index.dtype == torch.int64
    assert index.tolist() == wanted
    torch.testing.assert_close(got, score, rtol=0, atol=0, equal_nan=True)
    if kind != "nan":
        kept = index[:, prefix : prefix + n] - prefix
        chance = F.logsigmoid(score.double()).scatter(1, kept, -math.inf)
        torch.testing.assert_close(share.double(), chance.softmax(1), rtol=1e-4, atol=1e-7)
        assert (share.gather(1, kept) == 0).all()


@pytest.mark.parametrize("kind", ["", "ties", "nan", "equal", "far"])
@pytest.mark.parametrize(("batch", "p", "n", "prefix", "packages"), HARD)
def test_choose(batch, p, n, prefix, packages, kind):
    check_choose(kernels.selector_choose, kind, batch, p, n, prefix, packages)


def select(case: Case, *given: object, **changes: object) -> tuple[Tensor, ...]:
    return torch.ops.slimvit.selected_tokens(**arguments(case, *given) | changes)


def arguments(case: Case, x: Tensor, selector: Selector) -> dict[str, object]:
    given = {"n": case.n, "prefix": case.prefix, "packages": case.packages, "eps": 1e-6}
    return given | {"x": x, "weights": [*fold_selector(selector, x.dtype)]}


def package(case: Case, x: Tensor, selector: Selector, kept: Tensor, dtype: torch.dtype) -> Tensor:
    """The reference's mean of what is not kept, [B, D]."""
    score = exact_scores(case, x, selector, dtype)
    share = F.logsigmoid(score).scatter(1, kept, -math.inf).softmax(1)
    return (share.to(dtype)[:, None] @ patches_of(case, x).to(dtype))[:, 0]


def check_tokens(case: Case, dtype: torch.dtype, backend: str) -> None:
    """What is kept to the bit, and the package no worse than the reference's in `dtype`."""
    x, selector = inputs(case, dtype)
    out, stats, index = select(case, x, selector, backend=backend)
    assert (out.dtype, index.dtype) == (dtype, torch.int64)
    before = x.gather(1, index[:, :-1, None].expand(-1, -1, x.shape[2]))
    assert torch.equal(out[:, :-1], before)
    assert (index[:, -1] == x.shape[1]).all()
    check_stats(stats, out)
    kept = index[:, case.prefix : case.prefix + case.n] - case.prefix
    exact, own = (package(case, x, selector, kept, kind) for kind in (torch.float64, dtype))
    got = out[:, -1]
    assert distance(got, exact) <= max(2 * distance(own, exact), FLOOR[dtype])
    score = exact_scores(case, x, selector, torch.float64)
    away = torch.ones_like(score, dtype=torch.bool).scatter(1, kept, False)
    worst, best = score.gather(1, kept).amin(1), score[away].view(case.batch, -1).amax(1)
    assert (worst > best - 8 * torch.finfo(dtype).eps * score.abs().amax(1)).all()


@dtypes
@pytest.mark.parametrize("case", CASES + ODD, ids=str)
def test_tokens(dtype, case):
    check_tokens(case, dtype, "triton")


def check_every_image_by_itself(dtype: torch.dtype, backend: str) -> None:
    """To the bit, whatever the other images hold."""
    case = Case(37, 30, 2, 40, 3, 5, 2)
    x, selector = inputs(case, dtype)
    together = select(case, x, selector, backend=backend)
    x[1, 9, 7], x[1, 20] = math.nan, math.inf
    beside = select(case, x, selector, backend=backend)
    for b in (0, 2):
        alone = select(case, x[b : b + 1], selector, backend=backend)
        for one, first, second in zip(alone, together, beside, strict=True):
            assert torch.equal(one[0], first[b])
            assert torch.equal(one[0], second[b])


@dtypes
def test_every_image_by_itself(dtype):
    check_every_image_by_itself(dtype, "triton")


def check_infinite(package_tokens, dtype: torch.dtype) -> None:
    """A back end's `package_tokens` where what is kept is no number."""
    random = Random()
    x = random(2, 9, 48, dtype=dtype)
    index = torch.tensor([[0, 2, 5, 9], [0, 1, 3, 9]]).to(x.device)
    share = random(2, 8).abs().scatter(1, index[:, 1:3] - 1, 0.0)
    x[0, 2], x[1, 3, 4] = math.inf, math.nan
    wanted = share.double()[:, None] @ x[:, 1:].double().nan_to_num(0, 0, 0)
    out, _ = package_tokens(x, index, share, 1)
    assert distance(out[:, -1:], wanted) <= {torch.float32: 1e-6}.get(dtype, 4e-3)
    assert out[0, 1].isinf().all()


@dtypes
def test_a_kept_token_does_not_count_in_the_package(dtype):
    check_infinite(kernels.package_tokens, dtype)


@pytest.mark.parametrize("call", ["refused", "empty", "opcheck"])
def test_op(call):
    case = Case(5, 2, 3, 16, 2, 2, 1)
    x, selector = inputs(case, torch.float32)
    if call == "opcheck":
        op = torch.ops.slimvit.selected_tokens
        torch.library.opcheck(op, (), arguments(case, x, selector))
    elif call == "empty":
        out, stats, index = select(case, x[:0], selector)
        assert (out.shape, stats.shape, index.shape) == ((0, 6, 48), (0, 6, 3, 2), (0, 6))
        assert index.dtype == torch.int64
    else:
        rule = r"x must be \[B, m, D\] with D = 48, float32, on "
        few = "n must be more than 0 and less than the "
        weights = arguments(case, x, selector)["weights"]
        wrong = [
            ({"weights": weights[1:]}, "weights must be 12 tensors, embed, .*, got 11"),
            ({"weights": [weights[0][0], *weights[1:]]}, "embed of the weights must have 3 dimen"),
            (
                {"weights": [*weights[:-1], weights[-1][1:]]},
                r"weigh2_bias of the weights must be \[3\], float32, contiguous, on .*, got \[2\]",
            ),
            ({"prefix": -1}, "prefix and packages must be at least 0, got -1"),
            ({"n": 5}, few + "5 patches of 8 tokens, got 5"),
            ({"n": 0}, few + "5 patches of 8 tokens, got 0"),
            ({"packages": 5}, few + "1 patches of 8 tokens, got 2"),
            ({"x": x[..., :40]}, rule),
            ({"x": x[0]}, rule),
            ({"x": x.double()}, rule),
            (
                {"x": x[:1].expand(65536, -1, -1)},
                "a batch must have at most 65535 images, got 65536",
            ),
            ({"backend": "tpu"}, "back end must be one of triton, cuda, got 'tpu'"),
        ]
        for changes, message in wrong:
            with pytest.raises(SlimvitError, match=message):
                select(case, x, selector, **changes)
        case = Case(5, 2, 1, 136)
        with pytest.raises(SlimvitError, match="heads must have at most 128 channels, got 136"):
            select(case, *inputs(case, torch.float32))


def test_what_kernels_do_not_select():
    wide, narrow = Selector(136, 1), Selector(128, 1)
    channels = "block 2: its selector's heads must have at most 128 channels, got 136"
    wrong = [
        ([None, SelectorParts(wide, 3, 0)], channels),
        ([SelectorParts(narrow, None, 0)], "block 1: its selector keeps as many patches as it"),
        ([SelectorParts(narrow, 3, 0), AbsorbParts(1)], "a selector stands among blocks that"),
    ]
    for backend in ("triton", "cuda"):
        for choosers, message in wrong:
            assert why_not_chosen(choosers, backend).startswith(message)
        assert why_not_chosen([SelectorParts(narrow, 3, 0), None], backend) is None


def test_sizes_that_the_cuda_kernels_have_no_room_for():
    """Told where a back end is chosen, not by the first call."""
    choosers = [None, AbsorbParts(1)]
    many = "block 2: it chooses among at most 2048 tokens, got 2049"
    wide = "block 2: it absorbs tokens of at most 1536 channels, got 1552"
    assert why_not_chosen(choosers, "cuda", [2305, 2049], 64) == many
    assert why_not_chosen(choosers, "cuda", [2305, 2048], 1552) == wide
    assert why_not_chosen(choosers, "cuda", [2305, 2048], 1536) is None
    assert why_not_chosen(choosers, "triton", [2305, 2049], 1552) is None
    selector = [SelectorParts(Selector(128, 1), 3, 0)]
    assert why_not_chosen(selector, "cuda", [2048], 1552) is None
    assert "at most 2048 tokens" in why_not_chosen(selector, "cuda", [2049], 64)
