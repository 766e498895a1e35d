"""Blocks that choose tokens for each image by fused kernels, against plain PyTorch."""

import functools

import pytest
import torch
from fused_blocks import Case, make, make_parts
from kernel_checks import DEVICE, DTYPES, FLOOR, Random, check_stats, distance, kernels
from predictors import check_predictors
from torch import Tensor, nn

from slimvit.dynamic import Absorb
from slimvit.errors import SlimvitError
from slimvit.ops import Alive, PredictorParts, View, candidates, dynamic_block
from slimvit.ops.fused_dynamic import _Predicting

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.usefixtures("poison_empty")


# Block, prefix tokens, tokens that the head reads, whether tokens stand for several.
BLOCKS = [
    (Case(5, 3, 3), 1, 1, False),
    (Case(5, 3, 1, biases=False, norm_bias=False), 2, 2, True),
    (Case(17, 2, 3, 64, 2, 32, act="quick_gelu"), 1, 1, True),
    (Case(33, 20, 1, 192, 3, 64, 96), 5, 1, False),
    (Case(19, 18, 1, 272, 1, 48), 2, 2, True),  # too wide for the second half in one launch
]


blocks = pytest.mark.parametrize(("case", "prefix", "tokens", "sized"), BLOCKS, ids=str)


def alive_of(case: Case, sized: bool, seed: int, dtype: torch.dtype) -> Alive:
    random = Random(seed)
    x = random(case.m, case.batch, case.width, dtype=dtype)
    place = torch.arange(case.m, device=DEVICE).expand(case.batch, -1)
    if not sized:
        return Alive(x, place)
    size = 1 + (3 * random(case.batch, case.m).abs()).round()
    return Alive(x, place, size, spread=(size > 1) * 0.5 * random(case.batch, case.m).square())


def reference(case: Case, alive: Alive, prefix: int, tokens: int, dtype: torch.dtype) -> Alive:
    """The block that absorbs, in `dtype`."""
    block, choose = make_parts(case, dtype), functools.partial(Absorb(counts=[1]).choose, 0)
    alive = alive._replace(x=alive.x.to(dtype))
    with torch.no_grad():
        return dynamic_block(alive, block, case.n, choose, prefix=prefix, head_tokens=tokens)


def choice(case: Case, alive: Alive, prefix: int, tokens: int) -> list:
    block = make_parts(case, alive.x.dtype)
    with torch.no_grad():
        view = View(alive, block, block.norm1(alive.x), prefix, tokens)
        return [t.tolist() for t in Absorb(counts=[1]).choose(0, view, case.n)[:2]]


def steady(case: Case, prefix: int, tokens: int, sized: bool, dtype: torch.dtype) -> Alive:
    """Tokens of `dtype` whose choice does not hang on how anything is rounded."""
    return steady_on(DEVICE, case, prefix, tokens, sized, dtype)


@functools.cache
def steady_on(
    device: torch.device, case: Case, prefix: int, tokens: int, sized: bool, dtype: torch.dtype
) -> Alive:
    for seed in range(200):
        alive = alive_of(case, sized, seed, dtype)
        exact = alive._replace(x=alive.x.double())
        noise = Random(seed + 1)
        unit = 4 * torch.finfo(dtype).eps
        shaken = [
            exact._replace(x=exact.x * (1 + unit * noise(*exact.x.shape).sign())) for _ in range(3)
        ]
        wanted = choice(case, exact, prefix, tokens)
        if all(choice(case, other, prefix, tokens) == wanted for other in shaken):
            return alive
    raise AssertionError("no such tokens were found")


def arguments(case: Case, alive: Alive, prefix: int, tokens: int) -> dict[str, object]:
    block, parts = make(case, alive.x.dtype), make_parts(case)
    bias = torch.zeros_like(parts.norm1.weight) if parts.norm1.bias is None else parts.norm1.bias
    return {
        "x": alive.x.transpose(0, 1),
        "stats": None,
        "sizes": [] if alive.size is None else [alive.size, alive.size.log(), alive.spread],
        "weights": [*block.buffers()],
        "norm": [parts.norm1.weight.detach(), bias.detach()],
        "n": case.n,
        "heads": case.heads,
        "prefix": prefix,
        "head_tokens": tokens,
        "candidates": candidates(case.m, case.n, prefix),
        "activation": case.act,
        "eps": [1e-6, 1e-5],
    }


def absorb(*given: object, **changes: object) -> tuple[Tensor, ...]:
    return torch.ops.slimvit.absorb_block(**arguments(*given) | changes)


class TestAbsorbBlock:
    @dtypes
    @blocks
    def test_errs_no_more_than_torch(self, dtype, case, prefix, tokens, sized):
        alive = steady(case, prefix, tokens, sized, dtype)
        out, stats, size, bias, spread, index = absorb(case, alive, prefix, tokens)
        wanted, own = (reference(case, alive, prefix, tokens, k) for k in (torch.float64, dtype))
        assert torch.equal(index, wanted.place)
        assert torch.equal(own.place, wanted.place)
        exact = wanted.x.transpose(0, 1)
        torchs = distance(own.x.transpose(0, 1), exact)
        assert distance(out, exact) <= max(2 * torchs, FLOOR[dtype])
        assert out.dtype == dtype
        check_stats(stats, out, spread)
        assert torch.equal(size, wanted.size)
        torch.testing.assert_close(bias, size.log(), rtol=1e-6, atol=1e-7)
        spreads = distance(own.spread, wanted.spread.double())
        assert distance(spread, wanted.spread.double()) <= max(2 * spreads, 4 * FLOOR[dtype])

    def test_statistics_may_be_given(self):
        case, alive = Case(17, 9, 2), alive_of(Case(17, 9, 2), True, 0, torch.float32)
        wanted = absorb(case, alive, 1, 1)
        x = alive.x.transpose(0, 1).contiguous()
        stats = kernels.row_stats(x)
        stats[:, :, 0, 1] += 48 * alive.spread
        got = absorb(case, alive, 1, 1, x=x, stats=stats)
        assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))

    def test_no_images(self):
        case = Case(17, 9, 0)
        alive = alive_of(case, True, 0, torch.float32)
        out, stats, size, bias, spread, index = absorb(case, alive, 1, 1)
        assert out.shape == (0, 9, 48)
        assert stats.shape == (0, 9, 3, 2)
        assert size.shape == bias.shape == spread.shape == index.shape == (0, 9)
        assert index.dtype == torch.int64

    @pytest.mark.parametrize("sized", [False, True])
    def test_opcheck(self, sized):
        case = Case(5, 3, 1 + sized)
        given = arguments(case, alive_of(case, sized, 0, torch.float32), 1, 1)
        torch.library.opcheck(torch.ops.slimvit.absorb_block, (), given)

    def test_refusals(self):
        case = Case(17, 9, 2)
        alive = alive_of(case, True, 0, torch.float32)
        sizes = [alive.size, alive.size.log(), alive.spread]
        rule = r"sizes must be \[B, m\] = \[2, 17\], float32, contiguous, on .*, got "
        norm = [torch.ones(48, device=DEVICE)] * 2
        long, double = [torch.ones(49, device=DEVICE), norm[1]], [norm[0], norm[1].double()]
        weights = arguments(case, alive, 1, 1)["weights"]
        wrong = [
            ({"weights": weights[:-1]}, "weights must be 12 tensors, qkv, .*, got 11"),
            ({"heads": 5}, "heads must divide the 48 channels of all heads, got 5"),
            ({"activation": "relu"}, "activation must be one of none, gelu, .*, got relu"),
            ({"eps": [1e-6]}, "eps must be those of two norms, got 1"),
            ({"norm": []}, "norm must be a weight and a bias, got 0"),
            ({"norm": long}, r"weight of the norm must be \[48\], float32, .*, got \[49\]"),
            ({"norm": double}, r"bias of the norm must be \[48\], float32, .* float64"),
            ({"prefix": -1}, "prefix must be at least 0, got -1"),
            ({"prefix": 0}, "prefix must be at least the 1 tokens that the head reads, got 0"),
            ({"head_tokens": 2}, "prefix must be at least the 2 tokens .*, got 1"),
            ({"n": 17}, "n must be more than the 1 prefix tokens and less than m = 17, got 17"),
            ({"n": 1}, "n must be more than the 1 prefix tokens and less than m = 17, got 1"),
            ({"prefix": 9}, "n must be more than the 9 prefix tokens and less than m = 17, got 9"),
            ({"sizes": [sizes[0].double(), *sizes[1:]]}, rule + r"\[2, 17\], float64"),
            ({"sizes": [sizes[0][:, :5], *sizes[1:]]}, rule + r"\[2, 5\], float32"),
            ({"sizes": [*sizes[:2], sizes[2].half()]}, rule + r"\[2, 17\], float16"),
            ({"sizes": sizes[:2]}, "sizes must be the sizes, their logs and the spreads, or nothi"),
            ({"head_tokens": 3}, r"head_tokens must be 1 or 2, got 3"),
            ({"x": alive.x.double()}, r"x must be \[B, m, D\] with D = 48, float32"),
            ({"backend": "tpu"}, "back end must be one of triton, cuda, got 'tpu'"),
        ]
        for changes, message in wrong:
            with pytest.raises(SlimvitError, match=message):
                absorb(case, alive, 1, 1, **changes)


class NoBlock(nn.Module):
    """In the place of a block: the tokens as they come."""

    tf32, backend = False, "triton"

    def forward(self, x: Tensor, index: Tensor, stats: Tensor | None) -> tuple:
        return x, stats


def test_predictors_of_any_activation_and_eps():
    def keep(parts: PredictorParts, x: Tensor, n: int) -> Tensor:
        predicting = _Predicting(parts, NoBlock(), torch.float32).to(DEVICE)
        return predicting(x.transpose(0, 1).to(DEVICE), None, [], n, 1)[3]

    check_predictors(keep)


@pytest.mark.parametrize("call", ["refused", "empty", "opcheck"])
def test_predicted_tokens(call):
    random, given = Random(), {"n": 3, "prefix": 1, "activation": "gelu", "eps": 1e-6}
    given["weights"] = [random(16, 48), random(16), random(16), random(16)]
    given |= {"x": random(2, 5, 48), "stats": None}
    predict = torch.ops.slimvit.predicted_tokens
    if call == "opcheck":
        torch.library.opcheck(predict, (), given)
    elif call == "empty":
        index = predict(**given | {"x": random(0, 5, 48)})
        assert index.shape == (0, 3)
        assert index.dtype == torch.int64
    else:
        rule = r"x must be \[B, m, D\] with D = 48, float32, on "
        weights, stats = given["weights"], r"stats must be \[B, m, parts, 2\] = \[2, 5, 3, 2\]"
        short = [*weights[:3], random(15)]
        wrong = [
            ({"weights": weights[:3]}, "weights must be 4 tensors, down, .*, got 3"),
            ({"weights": short}, r"score of the weights must be \[16\], float32, .*\[15\]"),
            ({"weights": [random(16), *weights[1:]]}, "down of the weights must have 2 dimensions"),
            ({"activation": "relu"}, "activation must be one of none, gelu, .*, got relu"),
            ({"stats": random(1)}, rf"{stats}, float32, contiguous, on .*, got \[1\]"),
            ({"prefix": -1, "n": 0}, "prefix must be at least 0, got -1"),
            ({"n": 5}, "n must be more than the 1 prefix tokens and less than m = 5, got 5"),
            ({"x": random(2, 5, 64)}, rule),
            ({"x": random(5, 48)}, rule),
            ({"x": random(2, 5, 48).double()}, rule),
        ]
        for changes, message in wrong:
            with pytest.raises(SlimvitError, match=message):
                predict(**given | changes)
