"""A plan that acts between blocks, with the C++ kernels: what `apply_masks` says of it."""

import pickle

import pytest
import torch
from references import build, off, random_images

import slimvit
from slimvit.backends import cpu
from slimvit.dynamic import Alive
from slimvit.errors import SlimvitError
from slimvit.runtime.accelerate import why_not_dynamic

REASON = cpu.why_not("cpu", torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no C++ kernels: {REASON}")


class Every(slimvit.Planner):
    """Merges the last two tokens into one of their common size before each of some blocks."""

    kind = "test_blockwise_every"

    def counts_for(self, spec):
        self.layers = range(spec.depth)
        return tuple(spec.tokens - 1 - i for i in range(spec.depth - 1)) + (spec.head_tokens,)

    def count(self, layer, received):
        return received if layer < self.spec.depth - 1 else self.counts[-1]

    def before(self, layer, alive):
        x, place = alive.x, alive.place
        size = alive.size if alive.size is not None else torch.ones_like(place, dtype=torch.float32)
        weight = size[:, -2:].t().unsqueeze(-1)
        merged = (x[-2:] * weight).sum(0, keepdim=True) / weight.sum(0)
        return Alive(
            torch.cat([x[:-2], merged.to(x.dtype)]),
            place[:, :-1],
            torch.cat([size[:, :-2], size[:, -2:].sum(1, keepdim=True)], 1),
        )


def spvit(keep, stages):
    return slimvit.SPViT(keep, stages=stages)


PLANS = {
    "spvit": lambda: spvit((0.7, 0.4), (0, 1)),
    "later": lambda: spvit((0.5,), (1,)),
    "nothing": lambda: spvit((1.0,), (1,)),
    "argmax": lambda: slimvit.SPViT((0.5,), stages=(1,), argmax=True),
    "every": Every,
}
NAMES = (
    "deit",
    "deit_distilled",
    "dinov2_reg4",
    "oblong",
    "clip_quickgelu",
    "no_classes",
    "fc_norm",
)


def pair(name, plan, precision="float32"):
    """The trainable model, its plan perturbed, and the fast one with the same plan."""
    model = build(name)
    slim = slimvit.apply_masks(model, PLANS[plan]())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in slim.plan.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    fast = slimvit.accelerate(model, slim.plan, backend="cpu", precision=precision)
    return slim, fast


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", NAMES)
def test_float32_is_what_apply_masks_says(name, plan, poison_empty):
    slim, fast = pair(name, plan)
    for batch in (1,) if plan == "argmax" else (1, 3):
        images = images_of(name, batch)
        with torch.no_grad():
            exact = slim.double()(images.double())
            wanted = slim.float()(images)
        assert fast.backend == "cpu" and fast.precision == "float32"
        assert off(fast(images), exact) <= max(2 * off(wanted, exact), 1e-5)
        for got, places in zip(fast.kept_sets(images), slim.kept_sets(images), strict=True):
            assert torch.equal(got, places)
        features = slim.forward_features(images)
        assert off(fast.forward_features(images), features) < 1e-4
        assert off(fast.forward_head(features), wanted) < 1e-4


def images_of(name, batch):
    return random_images(build(name), batch)


@pytest.mark.parametrize("plan", ["spvit", "every", "nothing"])
def test_bfloat16_is_no_further_off_than_torch(plan):
    slim, fast = pair("deit", plan, "bfloat16")
    images = images_of("deit", 16)
    with torch.no_grad():
        exact = slim.double()(images.double())
        theirs = slim.bfloat16()(images.bfloat16())
    got = fast(images)
    assert fast.precision == "bfloat16" and got.dtype == torch.float32
    assert fast(images.bfloat16()).dtype == torch.bfloat16
    # Near-ties of the scores may fall either way in both: the median image has none.
    errors, others = ((x.double() - exact).norm(dim=1) for x in (got, theirs))
    assert errors.median() <= 2 * others.median()


def test_auto_takes_it_and_choosing_plans_are_told_why_not():
    model = build("deit")
    plan = spvit((0.5,), (1,)).bind(slimvit.models.spec(model))
    assert why_not_dynamic(plan, "cpu") is None
    assert "no kernels for the planner spvit" in why_not_dynamic(plan, "triton")
    assert type(slimvit.accelerate(model, plan)).__name__ == "BlockwiseViT"


def test_it_is_an_accelerated_model():
    _, fast = pair("deit", "spvit")
    images = images_of("deit", 2)
    wanted = fast(images)
    assert torch.equal(pickle.loads(pickle.dumps(fast))(images), wanted)
    assert not fast.train().training and fast.num_classes == 7
    fast.warm_up(4)
    with pytest.raises(SlimvitError, match="packed for float32"):
        fast.to(torch.float64)
    with pytest.raises(SlimvitError, match="images must be floating point"):
        fast((images * 10).to(torch.uint8))
    with pytest.raises(SlimvitError, match="image"):
        fast(images[:, :, :32])
