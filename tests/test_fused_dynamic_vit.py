"""Models that choose tokens for each image by fused kernels, against plain PyTorch."""

import copy
import functools
import io
import math
import pickle

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, FLOOR, Random, distance
from references import build, random_images
from torch import nn

from slimvit.dynamic import DPS, Absorb, Planner, SPViT
from slimvit.errors import SlimvitError
from slimvit.models import Spec, spec
from slimvit.ops import PredictorParts
from slimvit.runtime import accelerate, apply_masks

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.usefixtures("poison_empty")


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
            (Reversed([12, 8, 1]), "triton has no kernels for the planner reversed; plain"),
            (Before([17, 8, 1]), "triton has no kernels for the planner before; plain"),
            (Pruned([0.7], stages=[1]), "triton has no kernels for the planner pruned; plain"),
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
