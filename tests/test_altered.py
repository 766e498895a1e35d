"""Modules that do more than their classes say: accelerated they answer alike, or are refused."""

import copy
import functools
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from references import build, off, random_images, random_masks, randomise
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from slimvit import DPS, Absorb, SPViT, accelerate, apply_masks
from slimvit.errors import SlimvitError, UnsupportedModelError
from slimvit.models import spec
from slimvit.ops.modules import activation_name, layer_norm_of

NEAR = 1e-5
COUNTS = {"deit": (17, 9, 1), "dinov2_reg4": (21, 12, 1)}


def bent(module: nn.Module, *given: object) -> object:
    """A hook, of the input or of the output; not one that a norm takes back."""
    return tuple(map(torch.sin, given[0])) if len(given) == 1 else given[-1].sin()


def answers_alike(model: nn.Module, plan: object, **options: object) -> nn.Module:
    """Accelerated, a model answers as with its masks or plan applied."""
    fast, slim = accelerate(model, plan, **options), apply_masks(model, plan).eval()
    images = random_images(model, 3)
    with torch.no_grad():
        assert off(fast(images), slim(images)) < NEAR
    return fast


HOOKED = ["patch_embed", "patch_embed.proj", "pos_drop", "patch_drop", "norm_pre", "norm"]
HOOKED += [
    f"blocks.1.{name}"
    for name in (
        *("norm1", "attn.proj", "attn.proj_drop", "ls1", "norm2", "drop_path1", "drop_path2"),
        *("mlp", "mlp.fc1", "mlp.act", "mlp.fc2", "mlp.drop1"),
    )
]


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("name", ["", *HOOKED])
def test_hooks_run(name, pre):
    plain = build("deit")
    model = copy.deepcopy(plain)
    module = model.get_submodule(name)
    module.register_forward_pre_hook(bent) if pre else module.register_forward_hook(bent)
    masks = random_masks(model)
    fast, images = answers_alike(model, masks), random_images(model, 3)
    assert fast.backend == "torch"
    with torch.no_grad():
        assert off(fast(images), apply_masks(plain, masks)(images)) > 0.001
    with pytest.raises(SlimvitError, match="has forward hooks, which would not run"):
        accelerate(model, masks, backend="cpu")


@pytest.mark.parametrize("name", ["head", "fc_norm", "head_drop"])
def test_hooks_of_the_head_run_in_any_back_end(name):
    model = build("deit")
    model.get_submodule(name).register_forward_hook(bent)
    assert answers_alike(model, random_masks(model)).backend == "cpu"


def test_a_head_of_its_own_is_called():
    class Doubled(VisionTransformer):
        def forward_head(self, x, pre_logits=False):
            return 2 * super().forward_head(x, pre_logits)

    model = Doubled(img_size=64, embed_dim=48, depth=3, num_heads=3, num_classes=7)
    answers_alike(randomise(model).eval(), random_masks(model), backend="cpu")


def test_hooks_of_a_plan_run():
    model = build("deit")
    plan = DPS(COUNTS["deit"]).bind(spec(model))
    plan.predictors["1"].register_forward_hook(lambda module, given, scores: -scores)
    assert answers_alike(model, plan).backend == "torch"
    with pytest.raises(SlimvitError, match="the plan.predictors.1 has forward hooks"):
        accelerate(model, plan, backend="cpu")


@pytest.mark.parametrize("name", ["mlp.fc1", "attn.proj", "norm2", "mlp"])
@pytest.mark.parametrize("plan", ["masks", "absorb"])
def test_a_forward_set_on_a_module_is_called(name, plan):
    model = build("deit")
    module = model.blocks[1].get_submodule(name)
    forward = type(module).forward
    module.forward = types.MethodType(lambda self, x: 1.5 * forward(self, x), module)
    plan = random_masks(model) if plan == "masks" else Absorb(counts=COUNTS["deit"])
    answers_alike(model, plan)
    with pytest.raises(SlimvitError, match="has a forward set on it, which would not run"):
        accelerate(model, plan, backend="cpu")


@pytest.mark.parametrize("name", ["", ".attn", ".attn.qkv"])
def test_a_forward_set_on_what_is_not_called_is_refused(name):
    model = build("deit")
    module = model.blocks[1].get_submodule(name.lstrip("."))
    module.forward = lambda x: x
    with pytest.raises(
        UnsupportedModelError, match=f"block 2{name} has a forward set on it, which"
    ):
        apply_masks(model, random_masks(build("deit")))
    model = build("deit")
    model.forward_features = lambda x: x
    with pytest.raises(UnsupportedModelError, match="it has a forward_features of its own"):
        apply_masks(model, random_masks(build("deit")))


class Scaled(nn.LayerNorm):
    """A norm that computes something else."""

    def forward(self, x):
        return 1.5 * super().forward(x)


class GELU(nn.Module):
    """Only called like the one that kernels know."""

    def forward(self, x):
        return F.gelu(1.5 * x)


@pytest.mark.parametrize("changes", [{"norm_layer": Scaled}, {"act_layer": GELU}], ids=str)
@pytest.mark.parametrize("plan", ["masks", "absorb"])
def test_classes_are_known_by_what_they_call(changes, plan):
    options = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}
    model = randomise(VisionTransformer(img_size=64, **options, **changes)).eval()
    plan = random_masks(model) if plan == "masks" else Absorb(counts=COUNTS["deit"])
    assert answers_alike(model, plan).backend == "torch"
    assert layer_norm_of(Scaled(8)) is None and activation_name(GELU()) is None


def whole(model: nn.Module) -> None:
    model.blocks[1] = model.blocks[0]


def part(name: str, model: nn.Module) -> None:
    setattr(model.blocks[1], name, getattr(model.blocks[0], name))


def one_weight(model: nn.Module) -> None:
    model.blocks[1].attn.proj.weight = model.blocks[0].attn.proj.weight


SHARED = [whole, functools.partial(part, "attn"), functools.partial(part, "mlp"), one_weight]


@pytest.mark.parametrize("share", SHARED, ids=["block", "attn", "mlp", "weight"])
@pytest.mark.parametrize("name", ["dinov2_reg4", "dinov2_swiglu"])
def test_blocks_may_share_what_a_layer_scale_goes_into(share: Callable, name):
    model = build(name)
    share(model)
    for backend in ("torch", "cpu") if name == "dinov2_reg4" else ("torch",):
        answers_alike(model, random_masks(model), backend=backend)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", ["deit", "qk_norm", "dinov2_reg4"])
def test_weights_that_a_hook_computes_are_computed(name):
    model = build(name)
    nn.utils.weight_norm(model.blocks[0].mlp.fc1)
    torch.nn.utils.prune.l1_unstructured(model.blocks[1].attn.proj, "weight", 0.3)
    with torch.no_grad():
        model(random_images(model, 1))
        model.blocks[0].mlp.fc1.weight_g.mul_(2)  # the weight of the last call is another
    answers_alike(model, random_masks(model))


@pytest.mark.parametrize("size", [70, (79, 64)])
def test_the_rest_beside_whole_patches_is_left_out(size):
    model = VisionTransformer(img_size=size, embed_dim=48, depth=3, num_heads=3, num_classes=7)
    model = randomise(model).eval()
    assert answers_alike(model, random_masks(model)).backend == "torch"


class Adapted(nn.Module):
    """A linear layer with an adapter of low rank beside it, as peft wraps one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.in_features = base, base.in_features
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapt(module: nn.Module, name: str) -> None:
    setattr(module, name, Adapted(getattr(module, name)))


def hook(module: nn.Module, name: str) -> None:
    getattr(module, name).register_forward_hook(bent)


def replace(module: nn.Module, name: str) -> None:
    setattr(module, name, nn.Hardtanh(-0.1, 0.1))


def set_forward(module: nn.Module, name: str) -> None:
    getattr(module, name).forward = lambda tokens: tokens[:, :7].sin()


@pytest.mark.parametrize(
    "plan",
    [
        lambda model: random_masks(model),
        lambda model: random_masks(model, "zero"),
        lambda model: Absorb(counts=COUNTS["deit"]),
        lambda model: DPS(COUNTS["deit"]),
        lambda model: SPViT((0.7, 0.5), stages=(0, 1)),
    ],
)
def test_queries_keys_and_values_are_adapted_after_slimming(plan):
    """Of all rows or of some: as if the adapters were in the weights."""
    model = build("deit")
    slim, images = apply_masks(model, plan(model)).eval(), random_images(model, 3)
    merged = copy.deepcopy(slim)
    for one, other in zip(slim.blocks, merged.blocks, strict=True):
        adapt(one.attn, "qkv")
        with torch.no_grad():
            other.attn.qkv.weight += one.attn.qkv.up.weight @ one.attn.qkv.down.weight
    assert off(slim(images), merged(images)) < NEAR
    slim(images).square().sum().backward()
    assert all(block.attn.qkv.down.weight.grad.abs().sum() > 0 for block in slim.blocks)


@pytest.mark.parametrize("name", ["blocks.1", "blocks.0.qkv", "blocks.2.fc2"])
def test_hooks_on_what_is_accelerated_run(name):
    model = build("deit")
    fast, images = accelerate(model, random_masks(model), backend="torch"), random_images(model, 2)
    before = fast(images)
    fast.network.get_submodule(name).register_forward_hook(bent)
    assert off(fast(images), before) > 1e-3


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("head", adapt),
        ("head", hook),
        ("head", set_forward),
        ("fc_norm", hook),
        ("fc_norm", replace),
        ("head_drop", replace),
    ],
)
@pytest.mark.parametrize("copied", [lambda fast: fast, copy.deepcopy])
def test_a_head_does_more_later(name, change, copied):
    model = build("deit")
    fast, images = accelerate(model, random_masks(model), backend="cpu"), random_images(model, 2)
    before = fast(images)
    change(fast.network, name)
    fast = copied(fast)
    assert off(fast(images), before) > 1e-3
    assert off(fast(images), fast.forward_head(fast.forward_features(images))) < NEAR


@pytest.mark.parametrize("fused", [False, True])
def test_a_head_is_trained(fused):
    model = build("deit")
    fast, images = accelerate(model, random_masks(model), backend="cpu"), random_images(model, 2)
    fast.network.head.requires_grad_(True)
    optimizer = torch.optim.SGD(fast.network.head.parameters(), lr=0.5, fused=fused)
    fast(images).square().sum().backward()
    assert fast.network.head.weight.grad.abs().sum() > 0
    optimizer.step()
    with torch.no_grad():
        assert off(fast(images), fast.forward_head(fast.forward_features(images))) < NEAR


def test_a_quantized_head_is_called():
    model = build("deit")
    fast, images = accelerate(model, random_masks(model), backend="cpu"), random_images(model, 2)
    before = fast(images)
    torch.ao.quantization.quantize_dynamic(fast, {nn.Linear}, inplace=True)
    assert 0 < off(fast(images), before) < 0.05


class TestPackedWeights:
    """The `torch` back end packs weights once, and anew when they have changed."""

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
    def test_that_are_trained(self, optimizer, fused):
        """Fused optimizers count no versions."""
        model = build("deit")
        fast = accelerate(model, random_masks(model), backend="torch")
        images = random_images(model, 2)
        with torch.no_grad():
            before = fast(images)
        fast.requires_grad_(True)
        steps = optimizer(fast.parameters(), lr=0.05, fused=fused)
        for _ in range(2):
            fast(images).square().mean().backward()
            steps.step()
            with torch.no_grad():
                assert off(fast(images), before) > 1e-3
                assert off(fast(images), copy.deepcopy(fast)(images)) < NEAR

    def test_that_are_transposed(self):
        model = build("deit")
        fast, images = (
            accelerate(model, random_masks(model), backend="torch"),
            random_images(model, 2),
        )
        before = fast(images)
        for block in fast.network.blocks:
            block.proj.weight = nn.Parameter(block.proj.weight.t(), requires_grad=False)
        assert off(fast(images), before) > 1e-3
        assert off(fast(images), copy.deepcopy(fast)(images)) < NEAR

    @pytest.mark.parametrize("semantics", ["drop", "zero"])
    def test_of_several_models_at_once(self, semantics):
        model = build("deit")
        twins = [
            accelerate(
                randomise(copy.deepcopy(model)), random_masks(model, semantics), backend="torch"
            )
            for _ in range(2)
        ]
        images = random_images(model, 2)
        weights = torch.func.stack_module_state(twins)
        answer = functools.partial(torch.func.functional_call, twins[0])
        with torch.no_grad():
            got = torch.vmap(lambda p, b: answer((p, b), (images,)))(*weights)
            for one, twin in zip(got, twins, strict=True):
                assert off(one, twin(images)) < NEAR

    def test_of_another_call_are_not_taken_for_these(self):
        model = build("deit")
        fast, images = (
            accelerate(model, random_masks(model), backend="torch"),
            random_images(model, 2),
        )
        for scale in torch.linspace(0.5, 1.5, 12):
            weights = {name: scale * value for name, value in fast.state_dict().items()}
            got = torch.func.functional_call(fast, weights, (images,))
            twin = copy.deepcopy(fast)
            twin.load_state_dict(weights)
            assert off(got, twin(images)) < NEAR

    def test_that_are_replaced(self):
        model = build("deit")
        fast, images = (
            accelerate(model, random_masks(model), backend="torch"),
            random_images(model, 2),
        )
        for step in range(6):
            for parameter in fast.parameters():
                parameter.data = parameter.data * 1.01
                if step % 2:
                    parameter.data = parameter.data * 1.01
            twin = copy.deepcopy(fast)
            assert off(fast(images), twin(images)) < NEAR

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
    @pytest.mark.parametrize("semantics", ["drop", "zero", "idle"])
    def test_are_no_constants_of_a_trace(self, semantics):
        model = build("deit")
        fast = accelerate(model, random_masks(model, semantics), backend="torch")
        traced = torch.jit.trace(fast, random_images(model, 2))
        images = random_images(model, 5, seed=1)
        assert off(traced(images), fast(images)) < NEAR

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
    def test_selectors_are_traced(self):
        model = build("deit")
        plan = SPViT((0.7, 0.5), stages=(0, 1))
        for slim in (apply_masks(model, plan).eval(), accelerate(model, plan, backend="torch")):
            traced = torch.jit.trace(slim, random_images(model, 2))
            images = random_images(model, 5, seed=1)
            assert off(traced(images), slim(images)) < NEAR

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
    def test_numbers_of_patches_of_each_images_own_are_not_traced(self):
        model = build("deit")
        plan = Absorb(counts=COUNTS["deit"], thresholds=[0.1] * 3)
        for slim in (apply_masks(model, plan).eval(), accelerate(model, plan, backend="torch")):
            with pytest.raises(UnsupportedModelError, match="torch.jit.trace would hold on to the"):
                torch.jit.trace(slim, random_images(model, 1))
