"""Modules that do more than their classes say: accelerated they answer alike, or are refused."""

import copy
import functools
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from references import bent, build, off, random_images, random_masks, randomise
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from slimvit import DPS, Absorb, accelerate, apply_masks
from slimvit.errors import SlimvitError, UnsupportedModelError
from slimvit.models import spec
from slimvit.ops.modules import activation_name, layer_norm_of

NEAR = 1e-5
COUNTS = {"deit": (17, 9, 1), "dinov2_reg4": (21, 12, 1)}


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


class Growing(nn.Sequential):
    def forward(self, x):
        for block in self:
            x = 1.1 * block(x)
        return x


def grow(model: nn.Module) -> None:
    model.blocks = Growing(*model.blocks)


def watch_blocks(model: nn.Module) -> None:
    model.blocks.register_forward_hook(bent)


def forward_of_blocks(model: nn.Module) -> None:
    model.blocks.forward = torch.sin


def watch_attention(model: nn.Module) -> None:
    model.blocks[1].attn.fused_attn = False
    model.blocks[1].attn.attn_drop.register_forward_hook(bent)


def scale_logits(model: nn.Module) -> None:
    model.blocks[1].attn.fused_attn, model.blocks[1].attn.scale = False, 0.05


def pool_by_itself(model: nn.Module) -> None:
    model.pool = lambda x, pool_type=None: x.mean(1)


def pool_by_attention(model: nn.Module) -> None:
    model.attn_pool = nn.Identity()


def embed_by_more(model: nn.Module) -> None:
    model.patch_embed.proj = nn.Sequential(model.patch_embed.proj, nn.GELU())


def without_blocks(model: nn.Module) -> None:
    model.blocks = nn.Sequential()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (grow, "calls its blocks by Growing: only Sequential is read"),
        (watch_blocks, "blocks has forward hooks, which would not run"),
        (forward_of_blocks, "blocks has a forward set on it, which would not run"),
        (watch_attention, "block 2.attn.attn_drop is more than dropout and would not run"),
        (scale_logits, r"block 2.attn scales logits by 0.05: only 1 / sqrt\(head_dim\) = 0.25"),
        (pool_by_itself, "it has a pool of its own"),
        (pool_by_attention, "has an attn_pool and cannot be slimmed: attention pooling reads"),
        (embed_by_more, "embeds patches by Sequential: only Conv2d is read"),
        (without_blocks, "has no block to slim"),
    ],
)
def test_what_would_be_lost_is_refused(change, reason):
    model = build("deit")
    masks = random_masks(model)
    change(model)
    for call in (accelerate, apply_masks):
        with pytest.raises(UnsupportedModelError, match=reason):
            call(model, masks)


class Doubled(VisionTransformer):
    def _pos_embed(self, x):
        return 2 * super()._pos_embed(x)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pos_drop", "its pos_drop is Hardtanh, not dropout"),
        ("head_drop", None),
        ("blocks.1.attn.proj_drop", "block 2: its proj_drop is Hardtanh, not dropout"),
        ("blocks.1.mlp.drop1", "block 2: its MLP is Mlp, not two layers"),
        ("blocks.1.mlp.drop2", "block 2: its MLP is Mlp, not two layers"),
        ("blocks.1.drop_path1", "block 2: its drop_path1 is Hardtanh, not dropout"),
        ("blocks.1.drop_path2", "block 2: its drop_path2 is Hardtanh, not dropout"),
        ("_pos_embed", "it has a _pos_embed of its own"),
    ],
)
def test_what_is_more_than_dropout_is_computed(name, reason):
    model = build("deit")
    if name == "_pos_embed":
        sizes = {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}
        model = randomise(Doubled(**sizes)).eval()
    else:
        model.set_submodule(name, nn.Hardtanh(-0.1, 0.1))
    masks = random_masks(model)
    for plan in (masks, Absorb(counts=COUNTS["deit"])):
        answers_alike(model, plan, backend="torch")
        assert answers_alike(model, plan).backend == ("torch" if reason else "cpu")
    if reason:
        with pytest.raises(SlimvitError, match=reason):
            accelerate(model, masks, backend="cpu")


def test_an_attribute_that_is_called_as_another_models_head():
    model = build("deit")
    model.head_dist = nn.Linear(48, 7)
    answers_alike(model, random_masks(model), backend="cpu")


def test_attention_without_dropout():
    model = build("deit")
    for block in model.blocks:
        block.attn.attn_drop = nn.Identity()
    answers_alike(model, random_masks(model))


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
