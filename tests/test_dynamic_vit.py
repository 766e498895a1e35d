"""Networks that choose tokens in C++, against the planners in float64, and as PyTorch sees them."""

import copy
import functools
import logging
import pickle

import pytest
import torch
from instruction_sets import DTYPES, isa  # noqa: F401
from references import build, off, random_images
from test_cpu_vit import PRECISIONS, mean_off, threads  # noqa: F401
from torch import Tensor, nn

from slimvit import _extensions
from slimvit.dynamic import DPS, Absorb, Planner, absorb
from slimvit.errors import SlimvitError
from slimvit.models import spec
from slimvit.ops import Choice, View
from slimvit.runtime import AcceleratedViT, accelerate, apply_masks

MODELS = ["deit", "deit_distilled", "dinov2_reg4", "oblong", "fc_norm"]
PLANS = ["absorb", "dps"]
FLOAT32 = 1e-5


def counts_of(model: nn.Module) -> tuple[int, int, int]:
    """The first block drops two patches, the last keeps what the head reads."""
    read = spec(model)
    return read.tokens - 2, read.prefix + read.patches // 2, read.head_tokens


def plan_of(name: str, counts: tuple[int, ...]) -> Planner:
    return Absorb(counts=counts) if name == "absorb" else DPS(counts)


@functools.cache
def bound(name: str, plan: str) -> Planner:
    """A plan whose predictors are larger than new ones are, so that scores lie apart."""
    model = build(name)
    found = plan_of(plan, counts_of(model)).bind(spec(model))
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(3).add_(0.1)
    return found


def make(name: str, plan: str, dtype: torch.dtype = torch.float32) -> AcceleratedViT:
    return accelerate(build(name), bound(name, plan), backend="cpu", precision=PRECISIONS[dtype])


class Replay(Planner):
    """The choice of another run: kept places of each block, [B, n], and another plan's merging."""

    def __init__(self, plan: Planner, kept: list[Tensor]) -> None:
        super().__init__(plan.counts)
        self.plan, self.kept = plan, kept

    def choose(self, layer: int, view: View, n: int) -> Choice:
        places = view.alive.place
        index = (places[:, :, None] == self.kept[layer][:, None, :]).any(2).nonzero()[:, 1]
        index = index.view(len(places), n)
        return merged(self.plan, view, index)


def merged(plan: Planner, view: View, index: Tensor) -> Choice:
    """What the plan does with that index."""
    if isinstance(plan, DPS):
        return Choice(index)
    chosen, absorb.top = absorb.top, lambda _scores, _n, _prefix: index
    try:
        return plan.choose(0, view, index.shape[1])
    finally:
        absorb.top = chosen


@torch.no_grad()
def answer(
    name: str, plan: Planner, images: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Features, logits and kept sets of PyTorch's own model."""
    slim = apply_masks(build(name), plan).eval().to(dtype)
    images = images.to(dtype)
    return slim.forward_features(images), slim(images), slim.kept_sets(images)


@pytest.mark.usefixtures("isa", "poison_empty")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", MODELS)
class TestAnswers:
    def test_float32(self, name, plan):
        fast = make(name, plan)
        images = random_images(build(name), 3)
        features, logits, kept = answer(name, bound(name, plan), images, torch.float64)
        assert all(map(torch.equal, fast.kept_sets(images), kept))
        assert off(fast.forward_features(images), features) < FLOAT32
        assert off(fast(images), logits) < FLOAT32

    def test_bfloat16_errs_no_more_than_torch_by_its_choice(self, name, plan):
        fast = make(name, plan, torch.bfloat16)
        images = random_images(build(name), 8)
        replay = Replay(bound(name, plan), fast.kept_sets(images))
        wanted = answer(name, replay, images, torch.float64)[:2]
        torchs = answer(name, replay, images, torch.bfloat16)[:2]
        got = fast.forward_features(images), fast(images)
        for mine, theirs, exact in zip(got, torchs, wanted):
            assert mean_off(mine, exact) <= 2 * mean_off(theirs, exact)


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_and_threads_do_not_matter(dtype, plan):
    """Neither how many images come together nor who computes them: the same bits and tokens."""
    fast = make("deit_distilled", plan, dtype)
    images = random_images(build("deit_distilled"), 17)
    torch.set_num_threads(1)
    alone = images.split(1)
    logits = torch.cat([fast(image) for image in alone])
    features = torch.cat([fast.forward_features(image) for image in alone])
    kept = [torch.cat(sets) for sets in zip(*(fast.kept_sets(image) for image in alone))]
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        for batch in (1, 2, 5, 17):
            assert torch.equal(fast(images[:batch]), logits[:batch]), (count, batch)
            assert torch.equal(fast.forward_features(images[-batch:]), features[-batch:])
            for got, wanted in zip(fast.kept_sets(images[:batch]), kept):
                assert torch.equal(got, wanted[:batch])


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [(9, 3, 1), (17, 2, 2), (3, 3, 3), (1, 1, 1), (17, 17, 17)])
@pytest.mark.parametrize("plan", ["absorb", "dps"])
def test_few_tokens_are_left(plan, counts, dtype):
    """Groups of images go through blocks together, blocks choose nothing, or one patch of all."""
    model = build("deit")
    planner = plan_of(plan, counts)
    images = random_images(model, 17)
    fast = accelerate(model, planner, backend="cpu", precision=PRECISIONS[dtype])
    torch.set_num_threads(1)
    alone = torch.cat([fast.forward_features(image) for image in images.split(1)])
    assert torch.equal(fast.forward_features(images), alone)
    replay = Replay(planner.bind(spec(model)), fast.kept_sets(images))
    with torch.no_grad():
        wanted = apply_masks(model, replay).double().forward_features(images.double())
    assert off(alone, wanted) < (FLOAT32 if dtype == torch.float32 else 0.1)


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("count", [1, 2])
def test_nan_stays_in_its_image_and_call(plan, count):
    torch.set_num_threads(count)
    fast = make("deit", plan)
    images = random_images(build("deit"), 5)
    wanted = fast(images)
    nan = images.clone()
    nan[3, 1, 20, 20] = torch.nan
    got = fast(nan)
    others = [0, 1, 2, 4]
    assert torch.equal(got[others], wanted[others])
    assert plan == "dps" or got[3].isnan().all()  # a predictor prunes what it finds no score for
    assert torch.equal(fast(images), wanted)


def test_no_images():
    fast = make("deit", "absorb")
    empty = torch.empty(0, 3, 64, 64)
    assert fast(empty).shape == (0, 7)
    assert fast.forward_features(empty).shape == (0, 17, 48)
    assert [tuple(places.shape) for places in fast.kept_sets(empty)] == [(0, 15), (0, 9), (0, 1)]


def arguments(fast: AcceleratedViT, images: Tensor, features: bool = False) -> list[object]:
    packed = fast.packed
    shape = [packed.counts[-1], packed.width] if features else [0, packed.classes]
    return [images, packed.packs, packed.sizes, packed.counts, *shape]


class TestOps:
    @pytest.mark.parametrize("features", [False, True])
    @pytest.mark.parametrize("plan", PLANS)
    def test_opcheck_of_a_network(self, plan, features):
        given = arguments(make("deit", plan), random_images(build("deit"), 3), features)
        torch.library.opcheck(torch.ops.slimvit.dynamic_vit, given)

    @pytest.mark.parametrize("sizes", [False, True])
    def test_opcheck_of_a_block(self, sizes):
        packed = make("deit", "absorb").packed
        of = tuple(1 + torch.rand(2, 3, 17)) if sizes else (None, None)
        _, _, pack, _, _, _, chooser, _ = packed.parts()
        given = (torch.randn(17, 3, 48), pack, chooser, 5, 1, *of)
        torch.library.opcheck(torch.ops.slimvit.dynamic_block, given)

    @pytest.mark.parametrize("plan", PLANS)
    @pytest.mark.usefixtures("fresh_compiler")
    def test_compile(self, plan):
        module = nn.Sequential(make("deit", plan), nn.Linear(7, 2))
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            for batch in (3, 1, 5):
                images = random_images(build("deit"), batch)
                assert torch.equal(compiled(images), module(images))

    def test_refused(self):
        images = random_images(build("deit"), 2)
        given = arguments(make("deit", "absorb"), images)
        half = make("deit", "absorb", torch.bfloat16).packed.parts()
        *network, first, second, none = parts = make("deit", "absorb").packed.parts()
        wrong = {
            "block 2 keeps 9 of 15 tokens, it needs a chooser": [*network, first, none, none],
            "packs must be .* a chooser for each block if any chooses, got 7": parts[:-1],
            "all packs must be of one model": [*network, half[5], second, none],
            "the pack of the chooser is something else": [*network, parts[1], second, none],
        }
        for message, packs in wrong.items():
            sizes = [pack.numel() for pack in packs]
            with pytest.raises(SlimvitError, match=f"back end cpu: {message}"):
                torch.ops.slimvit.dynamic_vit(given[0], torch.cat(packs), sizes, *given[3:])


class TestModule:
    @pytest.mark.parametrize("plan", PLANS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_copies(self, plan, dtype):
        fast, images = make("deit3", plan, dtype), random_images(build("deit3"), 3)
        wanted, kept = fast(images), fast.kept_sets(images)
        for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert (twin.backend, twin.precision) == ("cpu", PRECISIONS[dtype])
            assert torch.equal(twin(images), wanted)
            assert all(map(torch.equal, twin.kept_sets(images), kept))
            assert twin.plan.counts == fast.plan.counts

    def test_attributes(self):
        fast = make("deit", "absorb")
        assert fast.masks is None
        assert isinstance(fast.plan, Absorb)
        assert "backend=cpu, precision=float32, kept=(15, 9, 1)" in repr(fast)
        assert isinstance(accelerate(build("deit"), bound("deit", "dps")).plan, DPS)

    def test_features_lead_to_the_logits(self):
        fast, images = make("deit_distilled", "dps"), random_images(build("deit_distilled"), 3)
        assert off(fast.forward_head(fast.forward_features(images)), fast(images)) < FLOAT32

    def test_moving_is_refused(self):
        with pytest.raises(SlimvitError, match="weights are packed for float32 on the CPU"):
            make("deit", "absorb").to(torch.bfloat16)


class Mine(Absorb):
    """Chooses in a way of its own: no kernel may stand in for it."""

    kind = "mine_for_test"

    def choose(self, layer: int, view: View, n: int) -> Choice:
        return view.top(view.alive.x.norm(dim=-1).t(), n)


class TestChoice:
    def test_auto_takes_the_kernels(self):
        assert accelerate(build("deit"), bound("deit", "absorb")).backend == "cpu"

    def test_a_planner_without_kernels(self, caplog):
        plan, model = Mine(counts=(15, 9, 1)), build("deit")
        with pytest.raises(SlimvitError, match="cpu has no kernels for the planner mine_for_test"):
            accelerate(model, plan, backend="cpu")
        with caplog.at_level(logging.WARNING, "slimvit"):
            assert accelerate(model, plan).backend == "torch"
        assert "has no kernels for the planner mine_for_test" in caplog.text

    @pytest.mark.parametrize(
        ("name", "module", "reason"),
        [
            ("act", nn.ReLU(), "its predictor's activation is ReLU"),
            ("norm", nn.Identity(), "its predictor's norm is Identity"),
        ],
    )
    def test_a_predictor_without_kernels(self, name, module, reason):
        plan = DPS((15, 9, 1)).bind(spec(build("deit")))
        setattr(plan.predictors["1"], name, module)
        with pytest.raises(SlimvitError, match=f"block 2: {reason}"):
            accelerate(build("deit"), plan, backend="cpu")


def test_profile_tells_choosing_apart():
    module = _extensions.load("_cpu")
    fast, images = make("deit", "absorb"), random_images(build("deit"), 3)
    module.profile(True)
    fast(images)
    seconds = module.profile(False)
    assert seconds["choosing"] > 0
    assert seconds["gathering"] > 0
