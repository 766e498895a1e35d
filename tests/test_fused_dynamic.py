"""Blocks and models that choose tokens for each image by fused kernels, against plain PyTorch."""

import copy
import functools
import io
import math
import pickle

import pytest
import torch
from fused_blocks import Case, make, make_parts
from kernel_checks import DEVICE, DTYPES, FLOOR, Random, check_stats, distance, kernels
from references import build, random_images
from torch import Tensor, nn

from slimvit.dynamic import DPS, Absorb, Planner, SPViT
from slimvit.errors import SlimvitError
from slimvit.models import Spec, spec
from slimvit.ops import Alive, PredictorParts, View, candidates, dynamic_block
from slimvit.runtime import accelerate, apply_masks

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


@functools.cache
def steady(case: Case, prefix: int, tokens: int, sized: bool, dtype: torch.dtype) -> Alive:
    """Tokens of `dtype` whose choice does not hang on how anything is rounded."""
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
        given = arguments(case, alive_of(case, sized, 0, torch.float32), 1, 2)
        torch.library.opcheck(torch.ops.slimvit.absorb_block, (), given)

    def test_refusals(self):
        case = Case(17, 9, 2)
        alive = alive_of(case, True, 0, torch.float32)
        sizes = [alive.size, alive.size.log(), alive.spread]
        rule = r"sizes must be \[B, m\] = \[2, 17\], float32, contiguous, got "
        wrong = [
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
        wrong = [
            ({"n": 5}, "n must be more than the 1 prefix tokens and less than m = 5, got 5"),
            ({"x": random(2, 5, 64)}, rule),
            ({"x": random(5, 48)}, rule),
            ({"x": random(2, 5, 48).double()}, rule),
        ]
        for changes, message in wrong:
            with pytest.raises(SlimvitError, match=message):
                predict(**given | changes)


class Reversed(Planner):
    """Keeps the last patches, by Python alone."""

    kind = "reversed"

    def choose(self, layer, view, n):
        return view.top(torch.arange(view.alive.x.shape[0]).expand(view.alive.x.shape[1], -1), n)


@functools.cache
def model_of(name: str) -> nn.Module:
    """Not to be changed."""
    return build(name)


def plans(name: str) -> dict[str, Planner]:
    shape = spec(model_of(name))
    first, last = shape.prefix, shape.head_tokens
    counts = {"falling": [12, 8, last], "late": [shape.tokens, first + 4, first + 2]}
    counts |= {"alternating": [9, 9, first + 1], "prefix": [9, first, last]}
    return {
        "falling": Absorb(counts=counts["falling"]),
        "late": Absorb(counts=counts["late"]),
        "alternating": Absorb(counts=counts["alternating"]),
        "prefix": Absorb(counts=counts["prefix"]),
        "dps": DPS(counts["falling"]),
        "dps_alternating": DPS(counts["alternating"], hidden=5),
        "spvit": selecting(shape),
    }


@functools.cache
def selecting(shape: Spec) -> SPViT:
    """Two selectors whose weights are random enough for them to choose."""
    plan, random = SPViT([0.7, 0.4], stages=[0, 1]).bind(shape), Random(5)
    with torch.no_grad():
        for parameter in plan.parameters():
            parameter.add_(0.3 * random(*parameter.shape).to(parameter.device))
    return plan


PAIRS = [
    ("deit", "falling", 2),
    ("deit", "late", 1),
    ("deit", "prefix", 1),
    ("deit", "dps", 2),
    ("deit_distilled", "falling", 1),
    ("deit_distilled", "spvit", 2),
    ("dinov2_reg4", "late", 1),
    ("dinov2_reg4", "spvit", 1),
    ("clip_quickgelu", "dps_alternating", 1),
    ("no_biases", "alternating", 1),
]


def fast_of(name: str, plan: str, precision: str = "float32") -> nn.Module:
    model = copy.deepcopy(model_of(name)).to(DEVICE)
    return accelerate(model, plans(name)[plan], backend="triton", precision=precision)


class TestModels:
    @pytest.mark.parametrize(("name", "plan", "batch"), PAIRS)
    def test_features_are_those_of_the_reference(self, name, plan, batch):
        model, images = model_of(name), random_images(model_of(name), batch)
        fast = fast_of(name, plan)
        exact = apply_masks(copy.deepcopy(model).double(), plans(name)[plan]).eval()
        own = apply_masks(model, plans(name)[plan]).eval()
        with torch.no_grad():
            wanted = exact.forward_features(images.double())
            torchs = distance(own.forward_features(images), wanted)
            got = fast.forward_features(images.to(DEVICE)).cpu()
        assert distance(got, wanted) <= max(2 * torchs, 5 * FLOOR[torch.float32])
        assert torch.equal(got == 0, wanted == 0)  # the same places
        assert fast.plan.counts == own.plan.counts
        assert fast.masks is None

    @pytest.mark.parametrize("plan", ["falling", "dps", "spvit"])
    def test_kept_sets(self, plan):
        images = random_images(model_of("deit"), 2)
        exact = apply_masks(copy.deepcopy(model_of("deit")).double(), plans("deit")[plan]).eval()
        got = fast_of("deit", plan).kept_sets(images.to(DEVICE))
        wanted = exact.kept_sets(images.double())
        assert [t.tolist() for t in got] == [t.tolist() for t in wanted]

    @dtypes
    @pytest.mark.parametrize("plan", ["late", "dps_alternating"])
    def test_every_image_by_itself(self, dtype, plan):
        images = random_images(model_of("deit"), 2).to(DEVICE)
        fast = fast_of("deit", plan, str(dtype).removeprefix("torch."))
        wanted = fast(images)
        images[1, 1, 20, 20] = math.nan
        got, features = fast(images), fast.forward_features(images)
        assert got[1].isnan().all()
        assert torch.equal(got[0], wanted[0])
        assert torch.equal(fast.forward_head(features)[0], wanted[0])

    @dtypes
    def test_any_precision_chooses_nearly_the_same(self, dtype):
        images = random_images(model_of("deit"), 2).bfloat16().float()
        exact = apply_masks(copy.deepcopy(model_of("deit")).double(), plans("deit")["late"]).eval()
        wanted = exact.kept_sets(images.double())
        got = fast_of("deit", "late", str(dtype).removeprefix("torch."))
        got = got.kept_sets(images.to(DEVICE))
        same = sum(
            len(set(a) & set(b))
            for layer in (1, 2)
            for a, b in zip(got[layer].tolist(), wanted[layer].tolist(), strict=True)
        )
        assert same >= 0.9 * sum(t.numel() for t in wanted[1:])

    @pytest.mark.parametrize("plan", ["prefix", "dps_alternating"])
    def test_copies(self, plan):
        fast, images = fast_of("deit", plan), random_images(model_of("deit"), 1).to(DEVICE)
        wanted = fast(images)
        file = io.BytesIO()
        torch.save(fast, file)
        file.seek(0)
        copies = [pickle.loads(pickle.dumps(fast)), torch.load(file, weights_only=False)]
        for twin in [copy.deepcopy(copies.pop()), *copies]:
            assert torch.equal(twin(images), wanted)
            assert twin.plan.counts == fast.plan.counts

    @pytest.mark.parametrize("plan", ["alternating", "dps_alternating", "spvit"])
    @pytest.mark.usefixtures("fresh_compiler")
    def test_compile_and_export(self, plan):
        fast = fast_of("deit", plan)
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        shapes = ({0: torch.export.Dim("batch")},)
        images = random_images(model_of("deit"), 2).to(DEVICE)
        program = torch.export.export(fast, (images,), dynamic_shapes=shapes)
        wanted = fast(images[:1])
        assert torch.equal(compiled(images[:1]), wanted)
        assert torch.equal(program.module()(images[:1]), wanted)

    def test_moves_and_takes_no_images(self):
        fast = fast_of("deit", "falling")
        none = torch.zeros(0, 3, 64, 64, device=DEVICE)
        assert fast(none).shape == (0, 7)
        assert fast.forward_features(none).shape == (0, 17, 48)
        assert [kept.shape for kept in fast.kept_sets(none)] == [(0, 12), (0, 8), (0, 1)]
        with pytest.raises(SlimvitError, match=r"images must be \[B, 3, 64, 64\], got \[1, 3"):
            fast.kept_sets(torch.zeros(1, 3, 32, 32))
        with pytest.raises(SlimvitError, match="weights are folded for float32, got float16"):
            fast.half()
        assert "kept=(12, 8, 1)" in repr(fast)
        assert fast.to("meta")(none.to("meta")).shape == (0, 7)


class Before(DPS):
    """Its blocks choose, and something acts ahead of them."""

    kind = "before"

    def before(self, layer, alive):
        return alive


class Pruned(SPViT):
    """Its selectors do not decide alone."""

    kind = "pruned"

    def prune(self, layer, alive, patches):
        return super().prune(layer, alive._replace(x=alive.x.flip(2)), patches)


class Halved(DPS):
    """Its predictors have an activation that no kernel knows."""

    kind = "halved"

    def parts(self, layer: int) -> PredictorParts | None:
        return super().parts(layer)._replace(act=nn.ReLU())


class TestRefused:
    @pytest.mark.parametrize(
        ("plan", "message"),
        [
            (Reversed([12, 8, 1]), "triton has no kernels for the planner reversed yet"),
            (Before([17, 8, 1]), "triton has no kernels for the planner before yet"),
            (Pruned([0.7], stages=[1]), "triton has no kernels for the planner pruned yet"),
            (SPViT([0.7], stages=[1], argmax=True), "block 2: its selector keeps as many patches"),
            (
                Absorb(counts=[12, 8, 1], thresholds=[0.1] * 3),
                "block 1: it keeps as many patches as reach its threshold, not a fixed number",
            ),
            (Halved([17, 8, 1]), "block 2: its predictor's activation is ReLU, not GELU or"),
        ],
        ids=str,
    )
    def test_plans(self, plan, message):
        with pytest.raises(
            SlimvitError, match=f"back end triton does not compute this model: {message}"
        ):
            accelerate(model_of("deit"), plan, backend="triton")
