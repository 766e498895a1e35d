"""SPViT in C++, all of a network in one call, against its planner in float64."""

import copy
import functools
import logging
import pickle

import pytest
import timm
import torch
from instruction_sets import DTYPES, isa  # noqa: F401
from references import SMALL, build, off, random_images, randomise
from test_cpu_vit import PRECISIONS, mean_off, threads  # noqa: F401
from torch import Tensor, nn

from slimvit import Absorb, SPViT, _extensions, demo
from slimvit.dynamic import Alive, Planner, spvit
from slimvit.errors import SlimvitError
from slimvit.models import spec
from slimvit.runtime import AcceleratedViT, accelerate, apply_masks

FLOAT32 = 1e-5
MODELS = ["deit", "deit_distilled", "dinov2_reg4", "oblong", "fc_norm", "clip_quickgelu", "deep"]
PLANS = {
    "twice": lambda: SPViT((0.7, 0.4), stages=(0, 1)),
    "later": lambda: SPViT((0.5,), stages=(1,)),
    "argmax": lambda: SPViT((0.7, 0.4), stages=(0, 1), argmax=True),
    "thrice": lambda: SPViT((0.8, 0.5, 0.2), stages=(0, 2, 4)),
    "thrice_argmax": lambda: SPViT((0.8, 0.5, 0.2), stages=(0, 2, 4), argmax=True),
}


@functools.cache
def model_of(name: str) -> nn.Module:
    """Not to be changed."""
    if name != "deep":
        return build(name)
    options = {**SMALL, "depth": 6}
    return randomise(timm.create_model("deit_tiny_patch16_224", img_size=64, **options)).eval()


@functools.cache
def bound(name: str, plan: str) -> Planner:
    """A plan whose selectors' weights are larger than new ones are, so that scores lie apart."""
    found = PLANS[plan]().bind(spec(model_of(name)))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        if found.argmax:
            favour_half(name, found)
    return found


def favour_half(name: str, plan: SPViT) -> None:
    """Move the selectors' biases so that images differ in how many patches are favoured."""
    scores: list[Tensor] = []
    slim = apply_masks(model_of(name), plan).eval()
    for mine, given in zip(plan.selectors.values(), slim.plan.selectors.values(), strict=True):
        scores.clear()
        hook = given.register_forward_hook(lambda _, _x, y: scores.append(y[0, :, 0] - y[0, :, 1]))
        for image in random_images(model_of(name), 5):
            slim(image[None])
        hook.remove()
        ranked = torch.cat(scores).sort().values
        middle = len(ranked) // 2
        for selector in (mine, given):  # no score becomes zero: rounding must not decide
            selector.judge3.bias[..., 0] -= ranked[middle - 1 : middle + 1].mean()


def make(name: str, plan: str, dtype: torch.dtype = torch.float32) -> AcceleratedViT:
    precision = PRECISIONS[dtype]
    return accelerate(model_of(name), bound(name, plan), backend="cpu", precision=precision)


@torch.no_grad()
def torch_answer(
    name: str, plan: str, images: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Features, logits and kept sets of PyTorch's own model."""
    slim = apply_masks(model_of(name), bound(name, plan)).eval().to(dtype)
    images = images.to(dtype)
    return slim.forward_features(images), slim(images), slim.kept_sets(images)


WHOLE = [(name, plan) for name in MODELS[:-1] for plan in ("twice", "later")]
WHOLE += [("deep", "thrice"), ("deep", "twice")]


@pytest.mark.usefixtures("isa", "poison_empty")
class TestNetworks:
    @pytest.mark.parametrize(("name", "plan"), WHOLE)
    def test_float32(self, name, plan):
        fast, images = make(name, plan), random_images(model_of(name), 3)
        features, logits, kept = torch_answer(name, plan, images, torch.float64)
        assert all(map(torch.equal, fast.kept_sets(images), kept))
        assert off(fast.forward_features(images), features) < FLOAT32
        assert off(fast(images), logits) < FLOAT32

    @pytest.mark.parametrize(("name", "plan"), [("deep", "thrice"), ("deit_distilled", "twice")])
    def test_bfloat16_errs_no_more_than_torch_by_its_choice(self, name, plan, monkeypatch):
        fast = make(name, plan, torch.bfloat16)
        images = random_images(model_of(name), 8)
        chosen = positions(bound(name, plan), fast.kept_sets(images))

        def replayed(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            slim = apply_masks(model_of(name), bound(name, plan)).eval().to(dtype)
            answers = []
            for function in (slim.forward_features, slim):
                turns = iter(chosen)
                monkeypatch.setattr(spvit, "top", lambda *_, turns=turns: next(turns))
                with torch.no_grad():
                    answers.append(function(images.to(dtype)))
            return tuple(answers)

        got = fast.forward_features(images), fast(images)
        wanted, torchs = replayed(torch.float64), replayed(torch.bfloat16)
        for mine, theirs, exact in zip(got, torchs, wanted):
            assert mean_off(mine, exact) <= 2 * mean_off(theirs, exact)

    @pytest.mark.parametrize("name", ["deit", "deep", "deit_distilled"])
    def test_argmax_keeps_of_each_image_what_it_favours(self, name):
        plan = "thrice_argmax" if name == "deep" else "argmax"
        fast, images = make(name, plan), random_images(model_of(name), 7)
        kept, logits, features = fast.kept_sets(images), fast(images), fast.forward_features(images)
        lengths = set()
        for b, image in enumerate(images):
            answers = torch_answer(name, plan, image[None], torch.float64)
            assert off(features[b : b + 1], answers[0]) < FLOAT32
            assert off(logits[b : b + 1], answers[1]) < FLOAT32
            for mine, theirs in zip(kept, answers[2], strict=True):
                n = theirs.shape[1]
                assert torch.equal(mine[b : b + 1, :n], theirs) and (mine[b, n:] == -1).all()
            lengths.add(tuple(places.shape[1] for places in answers[2]))
        assert len(lengths) > 2
        assert tuple(places.shape[1] for places in kept) == tuple(map(max, zip(*lengths)))

    @pytest.mark.parametrize("favoured", [-300, 0, 300])
    def test_every_selector_keeps_and_prunes_one_at_least(self, favoured):
        """Of patches that it favours neither to keep nor to prune it keeps the first."""
        plan = PLANS["thrice_argmax"]().bind(spec(model_of("deep")))
        with torch.no_grad():
            for selector in plan.selectors.values():
                if not favoured:
                    selector.judge3.weight.zero_()
                    selector.judge3.bias.zero_()
                selector.judge3.bias[..., 0] += favoured
        fast = accelerate(model_of("deep"), plan, backend="cpu", precision="float32")
        slim, images = (
            apply_masks(model_of("deep"), plan).eval(),
            random_images(model_of("deep"), 2),
        )
        with torch.no_grad():
            assert off(fast(images), slim(images)) < FLOAT32
        wanted = [places[:, (places >= 0).any(0)] for places in slim.kept_sets(images)]
        assert all(map(torch.equal, fast.kept_sets(images), wanted))
        patches = [15, 14, 13] if favoured > 0 else [3, 2, 1]
        counts = [1 + n + package for package, n in enumerate(patches, 1) for _ in range(2)]
        assert [places.shape[1] for places in wanted] == [*counts[:-1], 1]


def positions(plan: SPViT, kept: list[Tensor]) -> list[Tensor]:
    """Which of the patches that reach each selector are among those that it kept, [B, n]."""
    found, tokens = [], torch.arange(plan.tokens).expand(len(kept[0]), -1)
    for stage in plan.plan_stages(plan.spec):
        first, places = plan.prefix, kept[stage.layer]
        before = tokens[:, first : first + stage.before]
        mine = places[:, first : first + stage.patches]
        index = (before[:, :, None] == mine[:, None, :]).any(2).nonzero()[:, 1]
        found.append(index.view(mine.shape))
        tokens = places
    return found


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", ["thrice", "thrice_argmax"])
def test_batch_and_threads_do_not_matter(plan, dtype):
    check_batches(make("deep", plan, dtype), random_images(model_of("deep"), 13))


def check_batches(fast: AcceleratedViT, images: Tensor) -> None:
    """Neither how many images come together nor who computes them: the same bits and tokens."""
    torch.set_num_threads(1)
    logits = torch.cat([fast(image) for image in images.split(1)])
    features, kept = fast.packed.kept(images)
    for count in (2, 5):
        torch.set_num_threads(count)
        for batch in (1, 3, 13):
            assert torch.equal(fast(images[:batch]), logits[:batch]), (count, batch)
            mine, places = fast.packed.kept(images[-batch:])
            assert torch.equal(mine, features[-batch:])
            assert all(torch.equal(got, wanted[-batch:]) for got, wanted in zip(places, kept))


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("plan", ["twice", "argmax"])
def test_nan_stays_in_its_image_and_call(plan, count):
    torch.set_num_threads(count)
    fast, images = make("deit", plan), random_images(model_of("deit"), 5)
    wanted, nan = fast(images), images.clone()
    nan[3, 1, 20, 20] = torch.nan
    got = fast(nan)
    others = [0, 1, 2, 4]
    assert torch.equal(got[others], wanted[others])
    assert got[3].isnan().all()  # its package is NaN
    assert torch.equal(fast(images), wanted)


def test_no_images():
    fast, empty = make("deit", "twice"), torch.empty(0, 3, 64, 64)
    assert fast(empty).shape == (0, 7)
    assert fast.forward_features(empty).shape == (0, 17, 48)
    assert [places.shape[1] for places in fast.kept_sets(empty)] == [13, 9, 1]


def test_the_digits_model():
    model = demo.load()
    slim = apply_masks(model, SPViT())
    images = random_images(model, 2)
    fast = accelerate(model, slim.plan, backend="cpu")
    with torch.no_grad():
        assert off(fast(images), slim.double()(images.double())) < FLOAT32


class TestOps:
    @pytest.mark.parametrize("plan", ["twice", "argmax"])
    @pytest.mark.parametrize("features", [False, True])
    def test_opcheck(self, plan, features):
        packed, images = make("deit", plan).packed, random_images(model_of("deit"), 3)
        torch.library.opcheck(torch.ops.slimvit.dynamic_vit, arguments(packed, images, features))

    @pytest.mark.parametrize("plan", ["twice", "argmax"])
    @pytest.mark.usefixtures("fresh_compiler")
    def test_compile(self, plan):
        module = nn.Sequential(make("deit", plan), nn.Linear(7, 2))
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            for batch in (3, 1, 5):
                images = random_images(model_of("deit"), batch)
                assert torch.equal(compiled(images), module(images))

    def test_refused(self):
        images = random_images(model_of("deit"), 2)
        given = arguments(make("deit", "twice").packed, images, False)
        half = make("deit", "twice", torch.bfloat16).packed.parts()
        favours = make("deit", "argmax").packed.parts()[-3:]
        *network, one, two, none = make("deit", "twice").packed.parts()
        wrong = {
            "the selector before block 2 expects 0 packages, there are 1": (
                [one, one, none],
                [13, 13, 1],
            ),
            "all packs must be of one model": ([half[-3], two, none], [13, 9, 1]),
            "block 1 keeps 12 of 13 tokens, it needs a chooser": ([one, two, none], [12, 9, 1]),
            "where images keep numbers of their own, the last": (favours, [17, 17, 17]),
            "the selector before block 2 must keep fewer patches than may reach it, 2, got 6": (
                [favours[0], two, none],
                [17, 9, 1],
            ),
            "dynamic_vit needs choosers": ([], [17, 17, 1]),
        }
        for rule, (choosers, counts) in wrong.items():
            with pytest.raises(SlimvitError, match=f"back end cpu: {rule}"):
                packs = [*network, *choosers]
                sizes = [pack.numel() for pack in packs]
                torch.ops.slimvit.dynamic_vit(images, torch.cat(packs), sizes, counts, *given[4:])

    def test_the_op_without_choosers(self):
        packed, images = make("deit", "twice").packed, random_images(model_of("deit"), 2)
        given = images, packed.packs, packed.sizes, packed.counts
        with pytest.raises(SlimvitError, match="packs with choosers are for dynamic_vit"):
            torch.ops.slimvit.slim_vit(*given, False, 0, packed.classes)

    def test_counts_without_room_for_what_an_image_may_keep(self):
        plan = Absorb(counts=(12, 8, 1), thresholds=(0, 0, 0))
        packed = accelerate(model_of("deit"), plan, backend="cpu").packed
        images = random_images(model_of("deit"), 2)
        with pytest.raises(SlimvitError, match="block 1 may keep all of 17 tokens, got room for 2"):
            torch.ops.slimvit.dynamic_vit(images, packed.packs, packed.sizes, [2, 2, 1], 0, 7)


def arguments(packed: nn.Module, images: Tensor, features: bool) -> list[object]:
    shape = [packed.counts[-1], packed.width] if features else [0, packed.classes]
    return [images, packed.packs, packed.sizes, packed.counts, *shape]


class Mine(SPViT):
    """Prunes in a way of its own: no kernel may stand in for it."""

    def prune(self, layer: int, alive: Alive, patches: int | None) -> Alive:
        return super().prune(layer, alive, 2)


class Ahead(Planner):
    """Acts ahead of blocks, which only SPViT's kernels do."""

    kind = "ahead_for_test"

    def before(self, layer: int, alive: Alive) -> Alive:
        return alive


class TestChoice:
    def test_auto_takes_the_kernels(self):
        fast = accelerate(model_of("deit"), bound("deit", "twice"))
        assert (fast.backend, fast.plan.counts) == ("cpu", (13, 9, 1))
        assert "backend=cpu, precision=float32, kept=(13, 9, 1)" in repr(fast)

    def test_nothing_is_pruned(self):
        fast, images = make_dense(), random_images(model_of("deit"), 2)
        with torch.no_grad():
            assert off(fast(images), model_of("deit")(images)) < FLOAT32

    @pytest.mark.parametrize("plan", [Mine((0.5,), stages=(1,)), Ahead((17, 17, 1))])
    def test_planners_without_kernels(self, plan, caplog):
        with pytest.raises(SlimvitError, match="cpu has no kernels for the planner"):
            accelerate(model_of("deit"), plan, backend="cpu")
        with caplog.at_level(logging.WARNING, "slimvit"):
            assert accelerate(model_of("deit"), plan).backend == "torch"
        assert "has no kernels for the planner" in caplog.text


def make_dense() -> AcceleratedViT:
    return accelerate(model_of("deit"), SPViT((1.0,), stages=(1,)), backend="cpu")


@pytest.mark.parametrize("plan", ["twice", "argmax"])
def test_copies(plan):
    fast, images = make("deit", plan), random_images(model_of("deit"), 3)
    wanted, kept = fast(images), fast.kept_sets(images)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(twin(images), wanted)
        assert all(map(torch.equal, twin.kept_sets(images), kept))


def test_profile_tells_selecting_apart():
    module = _extensions.load("_cpu")
    fast, images = make("deit", "twice"), random_images(model_of("deit"), 3)
    module.profile(True)
    fast(images)
    seconds = module.profile(False)
    assert seconds["choosing"] > 0
    assert seconds["gathering"] > 0
