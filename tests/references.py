"""Models of every family, shrunk, and what pruned tokens mean to them, through timm's own blocks.

Nothing here uses slimvit's operations: these are the oracles that it is tested against.
"""

import copy
import functools
import inspect
import math
from collections.abc import Callable

import timm
import torch
from timm.layers import Attention, QuickGELU, RmsNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from slimvit.masks import Masks
from slimvit.models import spec

ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": functools.partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
}
SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}


def _timm(name: str, img_size: int = 64, **options: object) -> Callable[[], nn.Module]:
    return functools.partial(timm.create_model, name, img_size=img_size, **{**SMALL, **options})


def _by_hand(**options: object) -> Callable[[], nn.Module]:
    return functools.partial(
        VisionTransformer, **{"img_size": 64, "patch_size": 16, **SMALL, **options}
    )


def _gated() -> nn.Module:
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, **SMALL)
    for block in model.blocks:
        block.attn = Attention(48, num_heads=3, qkv_bias=True, gated=True)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "deit": _timm("deit_tiny_patch16_224"),
    "deit_distilled": _timm("deit_tiny_distilled_patch16_224"),
    "deit3": _timm("deit3_small_patch16_224"),
    "augreg": _timm("vit_tiny_patch16_224"),
    "dinov2": _timm("vit_small_patch14_dinov2", 56),
    "dinov2_reg4": _timm("vit_small_patch14_reg4_dinov2", 56),
    "dinov2_swiglu": _timm("vit_giant_patch14_reg4_dinov2", 56),
    "clip": _timm("vit_base_patch16_clip_224"),
    "clip_quickgelu": _timm("vit_base_patch16_clip_quickgelu_224"),
    "qk_norm": _by_hand(qk_norm=True),
    "rms_norm": _by_hand(qk_norm=True, norm_layer=RmsNorm, qkv_bias=False),
    "scale_norms": _by_hand(scale_attn_norm=True, scale_mlp_norm=True, init_values=0.1),
    "no_embed_class": _by_hand(no_embed_class=True, reg_tokens=2),
    "no_biases": _by_hand(qkv_bias=False, proj_bias=False, init_values=0.1),
    "dynamic_img_size": _timm("deit_tiny_patch16_224", dynamic_img_size=True),
    "dynamic_img_pad": _by_hand(img_size=(40, 50), dynamic_img_size=True, dynamic_img_pad=True),
    "oblong": _by_hand(img_size=(48, 80), patch_size=(16, 8), in_chans=1),
    "no_classes": _timm("deit3_small_patch16_224", num_classes=0),
    "distilled_no_classes": _timm("deit_tiny_distilled_patch16_224", num_classes=0),
    "fc_norm": _by_hand(fc_norm=True),
    "no_final_norm": _by_hand(final_norm=False),
    "depth_1": _by_hand(depth=1),
}
if "gated" in inspect.signature(Attention).parameters:  # older timm forgets the class token below
    MODELS |= {"gated": _gated, "no_pos_embed": _by_hand(pos_embed="none")}


def build(name: str, seed: int = 0) -> nn.Module:
    """A model of MODELS with every parameter random, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        model = MODELS[name]()
    return randomise(model, seed).eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values everywhere: timm leaves biases zero, norms one and layer scales all alike."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() == 1:
            value = 0.7 * noise if name.endswith("bias") else 1 + 0.4 * noise
        elif "token" in name or "pos_embed" in name:
            value = noise
        else:  # queries and keys large enough for attention to choose
            value = 1.5 * noise / math.sqrt(parameter[0].numel())
        parameter.copy_(value)
    return model


@torch.no_grad()
def sharpened(name: str, sharpness: float) -> nn.Module:
    """A model of MODELS whose queries are that much longer, and softmaxes sharper."""
    model = build(name)
    for block in model.blocks:
        weight = block.attn.qkv.weight
        weight[: len(weight) // 3] *= sharpness
    return model


def transposed(model: nn.Module) -> nn.Module:
    """A copy whose weights have the same values and other strides."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last)
    assert not any(block.mlp.fc1.weight.is_contiguous() for block in twin.blocks)
    return twin


def random_images(model: nn.Module, batch: int, seed: int = 0) -> Tensor:
    """Images that a model takes, in its dtype."""
    shape = spec(model)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, shape.in_chans, *shape.image_size, generator=generator)
    return images.to(next(model.parameters()).dtype)


def random_masks(model: nn.Module, semantics: str = "drop", seed: int = 0) -> Masks:
    """Random nested masks; the last block keeps what the head reads and some patch or none."""
    shape = spec(model)
    generator = torch.Generator().manual_seed(seed)
    keep = torch.zeros(shape.depth, shape.tokens, dtype=torch.bool)
    alive = torch.ones(shape.tokens, dtype=torch.bool)
    for layer in range(shape.depth):
        alive = alive & (torch.rand(shape.tokens, generator=generator) < 0.7)
        alive[: shape.prefix if layer + 1 < shape.depth else shape.head_tokens] = True
        keep[layer] = alive
    return Masks(keep, shape.prefix, shape.grid, semantics)


@torch.no_grad()
def reference_features(model: nn.Module, images: Tensor, masks: Masks) -> Tensor:
    """All N tokens after the final norm, [B, N, D], computed by timm's blocks on all N tokens.

    drop: dead tokens are masked out of every softmax; zero: they are set to zero after each block;
    idle: x[kept] = block(x)[kept], as Patch Slimming's Eq. 2 reads.
    """
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    alive = torch.ones(masks.tokens, dtype=torch.bool)
    for block, keep in zip(model.blocks, masks.keep, strict=True):
        if masks.semantics == "drop":
            x = block(x, attn_mask=alive.expand(len(x), 1, masks.tokens, masks.tokens))
        elif masks.semantics == "zero":
            x = block(x) * keep[:, None]
        else:
            x = torch.where(keep[:, None], block(x), x)
        alive = keep
    x = model.norm(x)
    return x if masks.semantics == "idle" else x * alive[:, None]


def bent(module: nn.Module, *given: object) -> object:
    """A hook, of the input or of the output; not one that a norm takes back."""
    return tuple(map(torch.sin, given[0])) if len(given) == 1 else given[-1].sin()


def off(got: Tensor, wanted: Tensor) -> float:
    """The worst relative error of an image: max |got - wanted| / max |wanted|."""
    assert got.shape == wanted.shape, f"{list(got.shape)} instead of {list(wanted.shape)}"
    got, wanted = got.double().flatten(1), wanted.double().flatten(1)
    return ((got - wanted).abs().amax(1) / wanted.abs().amax(1)).max().item()
