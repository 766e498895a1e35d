"""Models: what is read, and what is refused and why."""

import functools

import pytest
import timm
import torch
from references import MODELS, SMALL, build, random_images
from timm.models import vision_transformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.utils import prune

from slimvit.errors import MasksError, SlimvitError, UnsupportedModelError
from slimvit.masks import Masks
from slimvit.models import block_module, block_parts, check_masks, embed, spec
from slimvit.runtime import accelerate, apply_masks


class TestSpec:
    def test_deit_tiny(self):
        read = spec(timm.create_model("deit_tiny_patch16_224"))
        assert (read.name, read.image_size) == ("deit_tiny_patch16_224", (224, 224))
        assert (read.patch_size, read.grid, read.in_chans) == ((16, 16), (14, 14), 3)
        assert (read.tokens, read.patches, read.prefix, read.head_tokens) == (197, 196, 1, 1)
        assert (read.depth, read.width, read.heads, read.head_dim) == (12, 192, 3, 64)
        assert (read.hidden, read.mlp_macs) == (768, 2 * 192 * 768)
        assert (read.gated, read.num_classes) == (False, 1000)

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("deit_distilled", {"prefix": 2, "head_tokens": 2, "tokens": 18}),
            ("dinov2_reg4", {"prefix": 5, "head_tokens": 1, "tokens": 21}),
            ("no_embed_class", {"prefix": 3, "head_tokens": 1, "tokens": 19}),
            ("oblong", {"grid": (3, 10), "patch_size": (16, 8), "in_chans": 1}),
            ("dynamic_img_pad", {"grid": (3, 4), "image_size": (40, 50)}),
            ("no_classes", {"num_classes": 0}),
            # SwiGLU packs gate and value into one matrix of twice the hidden width.
            ("dinov2_swiglu", {"hidden": 128, "mlp_macs": 3 * 48 * 128}),
            ("clip", {"hidden": 192, "name": "vit_base_patch16_clip_224"}),
        ],
    )
    def test_families(self, name, expected):
        read = spec(build(name))
        assert {key: getattr(read, key) for key in expected} == expected

    def test_gate(self):
        assert [name for name in MODELS if spec(build(name)).gated] in ([], ["gated"])

    def test_name_of_a_tag_is_the_architecture(self):
        model = timm.create_model("deit_tiny_patch16_224.fb_in1k", **SMALL)
        assert spec(model).name == "deit_tiny_patch16_224"

    @pytest.mark.parametrize("name", MODELS)
    def test_blocks_and_embedding(self, name):
        model = build(name)
        read = spec(model)
        assert len(block_parts(model)) == read.depth
        assert block_module(model, read.depth) is model.blocks[-1]
        with torch.no_grad():
            assert embed(model, random_images(model, 3)).shape == (3, read.tokens, read.width)


class TestEmbed:
    @pytest.mark.parametrize(
        "shape", [(3, 64, 64), (1, 3, 64, 63), (1, 3, 48, 64), (1, 1, 64, 64), (1, 2, 3, 64, 64)]
    )
    @pytest.mark.parametrize("name", ["deit", "dynamic_img_size"])
    def test_shape_refused(self, name, shape):
        message = rf"images must be \[B, 3, 64, 64\], got \[{', '.join(map(str, shape))}\]"
        with pytest.raises(SlimvitError, match=message):
            embed(build(name), torch.zeros(shape))


class CustomFeatures(VisionTransformer):
    def forward_features(self, x, attn_mask=None, is_causal=False):
        return super().forward_features(x).flip(1)


class TokenMixer(nn.Module):
    def __init__(self, **options):
        super().__init__()


def changed(change) -> nn.Module:
    model = build("deit")
    change(model)
    return model


def vit(**options) -> nn.Module:
    return VisionTransformer(**{"img_size": 32, **SMALL, **options})


def slim() -> nn.Module:
    model = build("deit")
    return apply_masks(model, Masks.dense(3, (4, 4)))


def fast() -> nn.Module:
    model = build("deit")
    return accelerate(model, Masks.dense(3, (4, 4)))


class OtherAttention(vision_transformer.Attention):
    pass


def with_attention(model: nn.Module) -> None:
    model.blocks[2].attn = OtherAttention(48, num_heads=3)


def with_mixer(model: nn.Module) -> None:
    model.blocks[1].mlp = TokenMixer()


def with_other_linear(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.blocks[2].attn.qkv)


def with_hook(model: nn.Module) -> None:
    model.blocks[1].attn.qkv.register_forward_hook(lambda *_: None)


def with_block_hook(model: nn.Module) -> None:
    model.blocks[0].register_forward_pre_hook(lambda *_: None)


def with_pruned_weights(model: nn.Module) -> None:
    prune.l1_unstructured(model.blocks[2].attn.qkv, "weight", 0.5)
    model.blocks[2].attn.qkv._forward_pre_hooks.clear()  # which compute the weight


class CustomForward(VisionTransformer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(super().forward(x), dim=-1)


_small = functools.partial(functools.partial, timm.create_model)


_swin = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}


_three = {"embed_dim": 48, "depth": 1, "num_heads": 3}


REFUSED = {
    "swin": (
        _small("swin_tiny_patch4_window7_224", **_swin),
        "SwinTransformer cannot be slimmed: windowed attention needs every patch",
    ),
    "swinv2": (
        _small("swinv2_tiny_window8_256", **_swin),
        "SwinTransformerV2 cannot be slimmed: windowed attention needs every patch",
    ),
    "naflex": (
        _small("naflexvit_base_patch16_gap", **_three),
        "NaFlexVit cannot be slimmed: its grid changes from image to image",
    ),
    "eva": (
        _small("eva02_tiny_patch14_224", **_three),
        "Eva cannot be slimmed: blocks of its own, with rotary position embeddings or",
    ),
    "beit": (
        _small("beit_base_patch16_224", **_three),
        "Beit cannot be slimmed: relative position biases are not implemented",
    ),
    "relative_positions": (
        _small("vit_relpos_small_patch16_224", **_three),
        "VisionTransformerRelPos cannot be slimmed: relative position biases are not implemented",
    ),
    "pit": (
        _small("pit_ti_224"),
        "PoolingVisionTransformer cannot be slimmed: pooling between its stages",
    ),
    "resnet": (
        _small("test_resnet"),
        "ResNet cannot be slimmed: it is not one of timm's VisionTransformer family",
    ),
    "not_a_model": (nn.Identity, "Identity cannot be slimmed: it is not one of timm's"),
    "hybrid": (
        _small("vit_tiny_r_s16_p8_224", **SMALL),
        "vit_tiny_r_s16_p8_224 embeds patches by HybridEmbed: only PatchEmbed is read",
    ),
    "siglip": (
        _small("vit_base_patch16_siglip_224", **SMALL),
        "global_pool='map' and cannot be slimmed: attention pooling reads every patch",
    ),
    "mean": (
        functools.partial(vit, global_pool="avg"),
        "global_pool='avg' and cannot be slimmed: "
        "a mean over patches needs every patch in the last block",
    ),
    "mean_without_class_token": (
        functools.partial(vit, global_pool="avg", class_token=False),
        "global_pool='avg' and cannot be slimmed: a mean over patches",
    ),
    "mean_and_maximum": (
        functools.partial(vit, global_pool="avgmax"),
        "global_pool='avgmax' and cannot be slimmed: a mean and maximum over patches",
    ),
    "maximum": (
        functools.partial(vit, global_pool="max"),
        "global_pool='max' and cannot be slimmed: a maximum over patches",
    ),
    "map": (
        functools.partial(vit, global_pool="map"),
        "global_pool='map' and cannot be slimmed: attention pooling",
    ),
    "no_pooling": (
        functools.partial(vit, global_pool=""),
        "global_pool='' and cannot be slimmed: without pooling every patch",
    ),
    "patch_drop": (
        functools.partial(vit, patch_drop_rate=0.1),
        "VisionTransformer drops random patches in training (patch_drop_rate)",
    ),
    "res_post_block": (
        functools.partial(vit, block_fn=vision_transformer.ResPostBlock),
        "block 1 is a ResPostBlock: only Block is read, which normalises first",
    ),
    "parallel_scaling_block": (
        functools.partial(vit, block_fn=vision_transformer.ParallelScalingBlock),
        "block 1 is a ParallelScalingBlock: only Block is read",
    ),
    "parallel_things_block": (
        functools.partial(vit, block_fn=vision_transformer.ParallelThingsBlock),
        "block 1 is a ParallelThingsBlock: only Block is read",
    ),
    "own_attention": (
        functools.partial(changed, with_attention),
        "block 3 has OtherAttention: only Attention is read",
    ),
    "own_features": (
        functools.partial(CustomFeatures, img_size=32, **SMALL),
        "CustomFeatures cannot be slimmed: it has a forward_features of its own",
    ),
    "own_mlp": (
        functools.partial(changed, with_mixer),
        "block 2 has TokenMixer, which may mix tokens: only Mlp, GluMlp, SwiGLU are read",
    ),
    "own_linear": (
        functools.partial(changed, with_other_linear),
        "block 3 projects queries by ParametrizedLinear: only a plain Linear can be split",
    ),
    "hooks": (
        functools.partial(changed, with_hook),
        "block 2.attn.qkv has forward hooks, which would not run: remove them first",
    ),
    "hooks_of_a_block": (
        functools.partial(changed, with_block_hook),
        "block 1 has forward hooks, which would not run: remove them first",
    ),
    "pruned_weights": (
        functools.partial(changed, with_pruned_weights),
        "block 3.attn.qkv computes its weight anew in each call: make it a parameter first",
    ),
    "own_forward": (
        functools.partial(CustomForward, img_size=32, **SMALL),
        "CustomForward cannot be slimmed: it has a forward of its own",
    ),
    "slim_already": (slim, "SlimVisionTransformer is slimmed already: give the dense model"),
    "fast_already": (fast, "is slimmed already: give the dense model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_with_the_reason(name):
    make, message = REFUSED[name]
    model = make()
    for call in (spec, lambda model: apply_masks(model, Masks.dense(3, (4, 4)))):
        with pytest.raises(UnsupportedModelError) as caught:
            call(model)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


class TestCheckMasks:
    def test_fitting(self):
        model = build("deit")
        check_masks(Masks.dense(3, (4, 4)), spec(model))
        name, size = "deit_tiny_patch16_224", (64, 64)
        check_masks(Masks.dense(3, (4, 4), model=name, image_size=size), spec(model))

    @pytest.mark.parametrize(
        ("name", "masks", "message"),
        [
            ("deit", Masks.dense(3, (4, 4), model="vit"), "of model vit, got model deit_tiny"),
            (
                "deit",
                Masks.dense(3, (4, 4), image_size=(64, 96)),
                r"of image size \(64, 96\), the model takes \(64, 64\)",
            ),
            ("deit", Masks.dense(4, (4, 4)), r"keep must be \[L, N\] = \[3, 17\], got \[4, 17\]"),
            ("deit", Masks.dense(3, (5, 4)), r"keep must be \[L, N\] = \[3, 17\], got \[3, 21\]"),
            ("deit", Masks.dense(3, (2, 8)), r"grid \(2, 8\) and 1 prefix tokens, the model has"),
            (
                "deit_distilled",
                Masks.dense(3, (1, 17), 1),
                r"grid \(1, 17\) and 1 prefix tokens, the model has \(4, 4\) and 2",
            ),
            (
                "deit_distilled",
                Masks.from_counts([9, 9, 1], (4, 4), 2),
                "the head reads the first 2 tokens",
            ),
        ],
    )
    @pytest.mark.parametrize("use", ["check", "apply_masks", "accelerate"])
    def test_refused(self, name, masks, message, use):
        model = build(name)
        calls = {
            "check": lambda: check_masks(masks, spec(model)),
            "apply_masks": lambda: apply_masks(model, masks),
            "accelerate": lambda: accelerate(model, masks),
        }
        with pytest.raises(MasksError, match=message):
            calls[use]()

    def test_pruned_class_token(self):
        keep = torch.ones(3, 17, dtype=torch.bool)
        keep[2, 0] = False
        with pytest.raises(MasksError, match="the head reads the first 1 tokens"):
            check_masks(Masks(keep, 1, (4, 4)), spec(build("deit")))
