"""MACs against torch's flop counter on what is really executed, and against the papers' numbers."""

import pytest
import timm
import torch
from references import MODELS, build, random_images, random_masks
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slimvit.dynamic import DPS, Absorb, Static
from slimvit.macs import cut, gmacs, paper_gmacs
from slimvit.masks import SEMANTICS, Masks
from slimvit.models import spec
from slimvit.runtime import accelerate, apply_masks

DEIT_TINY_COUNTS = [141, 141, 131, 121, *[111] * 7, 1]


def packed_linear_flops(x_shape, *others, out_shape=None, **_) -> int:
    """Of oneDNN's packed linear, with or without a residual [..., out] ahead of the weight."""
    weight = next(shape for shape in others if isinstance(shape, torch.Size) and len(shape) == 2)
    return 2 * x_shape.numel() * weight[0]


def counted(model: nn.Module, images: torch.Tensor) -> float:
    """GMACs of one image: half of the floating-point operations that torch counts."""
    packed = {torch.ops.mkldnn._linear_pointwise: packed_linear_flops}
    counter = FlopCounterMode(display=False, custom_mapping=packed)
    # Attention in plain products, of which every torch counts the operations.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(images)
    return counter.get_total_flops() / 2 / len(images) / 1e9


def falling(kind, model: nn.Module):
    """A plan that keeps two thirds of the patches, then one third, then the head's tokens."""
    shape = spec(model)
    counts = [shape.prefix + shape.patches * k // 3 for k in (2, 1)]
    return kind(counts=[*counts, shape.head_tokens])


def pruning(plan) -> list[tuple[int, int]]:
    """Tokens received and kept by the blocks that choose."""
    pairs = zip(plan.alive, plan.counts, strict=True)
    return [(m, n) for m, n in pairs if plan.prefix < n < m]


@pytest.fixture(scope="module")
def deit_tiny():
    return spec(timm.create_model("deit_tiny_patch16_224"))


class TestFlopCounter:
    @pytest.mark.parametrize("name", MODELS)
    def test_dense(self, name):
        model = build(name)
        assert gmacs(spec(model)) == pytest.approx(
            counted(model, random_images(model, 2)), rel=1e-9
        )

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("semantics", SEMANTICS)
    def test_accelerated(self, name, semantics):
        model = build(name)
        masks = random_masks(model, semantics)
        fast = accelerate(model, masks, backend="torch")  # whose operations torch can count
        run = counted(fast, random_images(model, 2))
        assert gmacs(spec(model), masks) == pytest.approx(run, rel=1e-9)

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("semantics", ["drop", "idle"])
    def test_slim(self, name, semantics):
        model = build(name)
        masks = random_masks(model, semantics)
        run = counted(apply_masks(model, masks), random_images(model, 2))
        assert gmacs(spec(model), masks) == pytest.approx(run, rel=1e-9)

    @pytest.mark.parametrize("name", ["deit", "deit_distilled", "dinov2_reg4", "dinov2_swiglu"])
    def test_a_plan_that_drops(self, name):
        """DPS: what it computes is what the masks of its counts compute, and its predictors."""
        model = build(name)
        plan = falling(DPS, model)
        slim = apply_masks(model, plan)
        run = counted(slim, random_images(model, 2))
        assert slim.plan.macs(spec(model)) > 0
        assert gmacs(spec(model), slim.plan) == pytest.approx(run, rel=1e-9)

    @pytest.mark.parametrize("name", ["deit", "deit_distilled", "dinov2_reg4"])
    def test_a_plan_that_absorbs(self, name):
        """Kernels average without products; plain PyTorch compares more than the candidates."""
        model = build(name)
        slim = apply_masks(model, falling(Absorb, model))
        shape, plan = spec(model), slim.plan
        extra = 0
        for m, n in pruning(plan):
            extra += n * (m - n) * (shape.width + 1)  # averages of tokens and lengths as products
            patches, some = m - shape.prefix, min(m - shape.prefix, 3 * (m - n))
            pairs = sum(patches - 1 - i for i in range(some))  # of each with those ahead of it
            extra += (m * m - pairs) * shape.width
            extra += shape.head_tokens * shape.width * shape.heads * shape.head_dim  # its queries
        run = counted(slim, random_images(model, 2))
        assert gmacs(shape, plan) + extra / 1e9 == pytest.approx(run, rel=1e-9)

    def test_static_plan(self):
        model = build("deit")
        masks = random_masks(model)
        plan = Static(masks).bind(spec(model))
        assert gmacs(spec(model), plan) == gmacs(spec(model), masks)
        run = counted(apply_masks(model, plan), random_images(model, 2))
        assert gmacs(spec(model), plan) == pytest.approx(run, rel=1e-9)

    def test_deit_tiny(self, deit_tiny):
        model = timm.create_model("deit_tiny_patch16_224").eval()
        masks = Masks.from_counts(DEIT_TINY_COUNTS, (14, 14))
        run = counted(apply_masks(model, masks), random_images(model, 1))
        assert gmacs(deit_tiny, masks) == pytest.approx(run, rel=1e-9)


class TestNumbers:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("deit_tiny_patch16_224", 1.2537),
            ("deit_small_patch16_224", 4.60),
            ("deit_base_patch16_224", 17.56),
        ],
    )
    def test_deit(self, name, expected):
        model = timm.create_model(name, weight_init="skip")
        digits = len(str(expected).split(".")[1])
        assert round(gmacs(spec(model)), digits) == expected

    def test_slim_deit_tiny(self, deit_tiny):
        masks = Masks.from_counts(DEIT_TINY_COUNTS, (14, 14))
        assert round(100 * cut(deit_tiny, masks), 1) == 45.0

    def test_class_token_alone_in_the_last_block(self, deit_tiny):
        masks = Masks.from_counts([197] * 11 + [1], (14, 14))
        assert round(100 * cut(deit_tiny, masks), 1) == 6.9

    def test_dense_masks_cut_nothing(self, deit_tiny):
        for semantics in SEMANTICS:
            assert cut(deit_tiny, Masks.dense(12, (14, 14), semantics=semantics)) == 0

    def test_semantics_cost(self, deit_tiny):
        drop, zero, idle = (
            gmacs(deit_tiny, Masks.from_counts(DEIT_TINY_COUNTS, (14, 14), semantics=semantics))
            for semantics in SEMANTICS
        )
        assert drop < zero < idle < gmacs(deit_tiny)
        # One more key for n queries in each of the eleven blocks that receive fewer than N.
        assert zero - drop == pytest.approx(2 * 192 * sum(DEIT_TINY_COUNTS[1:]) / 1e9, rel=1e-6)

    def test_paper_formula(self, deit_tiny):
        width, patches, classes = 192, 196, 1000
        by_hand = patches * 768 * width + width * classes
        for n in DEIT_TINY_COUNTS:
            by_hand += 4 * n * width**2 + 2 * n**2 * width + 8 * n * width**2
        masks = Masks.from_counts(DEIT_TINY_COUNTS, (14, 14))
        assert paper_gmacs(deit_tiny, masks) == pytest.approx(by_hand / 1e9, rel=1e-12)
        assert paper_gmacs(deit_tiny, masks) < gmacs(deit_tiny, masks)

    def test_paper_formula_of_the_dense_model(self, deit_tiny):
        assert paper_gmacs(deit_tiny) == gmacs(deit_tiny)

    def test_two_heads(self):
        one, two = (
            spec(VisionTransformer(num_classes=classes, embed_dim=48, depth=1, num_heads=3))
            for classes in (0, 1000)
        )
        assert gmacs(two) - gmacs(one) == pytest.approx(48 * 1000 / 1e9)
        model = build("deit_distilled")
        assert gmacs(spec(model)) - gmacs(spec(build("distilled_no_classes"))) == pytest.approx(
            2 * 48 * 7 / 1e9
        )
