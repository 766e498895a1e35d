"""timm's VisionTransformer family: DeiT, DeiT-III, AugReg ViT, DINOv2, CLIP towers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from timm.layers import GluMlp, Mlp, PatchEmbed, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, fx, nn

from slimvit.errors import MasksError, SlimvitError, UnsupportedModelError
from slimvit.masks import Masks
from slimvit.models.spec import Spec
from slimvit.ops import BlockParts
from slimvit.ops.modules import Through, altered, only_drops, unwrapped

_OTHER_FAMILIES = {
    "SwinTransformer": "windowed attention needs every patch of a window",
    "SwinTransformerV2": "windowed attention needs every patch of a window",
    "NaFlexVit": "its grid changes from image to image, static masks have one grid",
    "Eva": "blocks of its own, with rotary position embeddings or without, are not implemented",
    "VisionTransformerRelPos": "relative position biases are not implemented",
    "Beit": "relative position biases are not implemented",
    "PoolingVisionTransformer": "pooling between its stages needs the whole grid",
}
_TOKENWISE_MLPS = (Mlp, GluMlp, SwiGLU)
_POOLS = {
    "avg": "a mean over patches needs every patch in the last block",
    "avgmax": "a mean and maximum over patches need every patch in the last block",
    "max": "a maximum over patches needs every patch in the last block",
    "map": "attention pooling reads every patch of the last block",
    "prr": "attention pooling reads every patch of the last block",
    "": "without pooling every patch of the last block is an output",
}


def spec(model: nn.Module) -> Spec:
    """The shape of a timm VisionTransformer.

    Raises:
        UnsupportedModelError: the model cannot be slimmed; the message says why.
    """
    check_supported(model)
    block = model.blocks[0]
    embedding = model.patch_embed
    layers = [layer for part in block.mlp.children() for layer in _linears(part)[:1]]
    return Spec(
        name=model_name(model),
        image_size=tuple(embedding.img_size),
        patch_size=tuple(embedding.patch_size),
        grid=tuple(embedding.dynamic_feat_size(embedding.img_size)),
        in_chans=embedding.proj.in_channels,
        prefix=model.num_prefix_tokens,
        head_tokens=2 if isinstance(model, VisionTransformerDistilled) else 1,
        depth=len(model.blocks),
        width=model.embed_dim,
        heads=block.attn.num_heads,
        head_dim=block.attn.head_dim,
        hidden=layers[-1].in_features,
        mlp_macs=sum(layer.in_features * layer.out_features for layer in layers),
        gated=getattr(block.attn, "gate", None) is not None,
        num_classes=model.num_classes,
    )


def _linears(module: nn.Module) -> list[nn.Linear]:
    """The linear layers of a module; of an adapter the one that it wraps comes first."""
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def check_supported(model: nn.Module) -> None:
    """Refuse, by name and with the reason, what slimvit cannot slim."""
    kind = type(model).__name__
    if any(getattr(model, name, None) is not None for name in ("masks", "plan")):
        raise UnsupportedModelError(f"{kind} is slimmed already: give the dense model")
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"model must be a timm VisionTransformer, got {kind}")
    if not isinstance(model, VisionTransformer):
        reason = _OTHER_FAMILIES.get(kind, "it is not one of timm's VisionTransformer family")
        if any(isinstance(part, VisionTransformer) for part in model.modules()):
            reason += ", but holds one: give that"
        raise UnsupportedModelError(f"{kind} cannot be slimmed: {reason}")
    for name in ("forward", "forward_features", "pool"):
        own = getattr(type(model), name) is not getattr(VisionTransformer, name)
        if own or name in vars(model):
            raise UnsupportedModelError(f"{kind} cannot be slimmed: it has a {name} of its own")
    name = model_name(model)
    if model.global_pool != "token" or not model.has_class_token:
        reason = _POOLS.get(model.global_pool, "the head must read the class token")
        raise UnsupportedModelError(
            f"{name} has global_pool={model.global_pool!r} and cannot be slimmed: {reason}"
        )
    if model.attn_pool is not None:
        raise UnsupportedModelError(
            f"{name} has an attn_pool and cannot be slimmed: {_POOLS['map']}"
        )
    if type(model.patch_embed) is not PatchEmbed:
        raise UnsupportedModelError(
            f"{name} embeds patches by {type(model.patch_embed).__name__}: only PatchEmbed is read"
        )
    if not isinstance(model.patch_embed.proj, nn.Conv2d):
        raise UnsupportedModelError(
            f"{name} embeds patches by {type(model.patch_embed.proj).__name__}: only Conv2d is read"
        )
    if not isinstance(model.patch_drop, nn.Identity):
        raise UnsupportedModelError(
            f"{name} drops random patches in training (patch_drop_rate): masks choose the patches"
        )
    if len(model.blocks) == 0:
        raise UnsupportedModelError(f"{name} has no block to slim")
    reason = altered(f"{name}: blocks", model.blocks, deep=False)
    if reason is not None:
        raise UnsupportedModelError(f"{reason}, which would not run: remove them first")
    if type(model.blocks) not in (nn.Sequential, nn.ModuleList):
        raise UnsupportedModelError(
            f"{name} calls its blocks by {_class_name(model.blocks)}: only Sequential is read"
        )
    for index, block in enumerate(model.blocks):
        _check_block(f"{name}: block {index + 1}", block)


def _check_block(where: str, block: nn.Module) -> None:
    if type(block) is not Block:
        raise UnsupportedModelError(
            f"{where} is a {type(block).__name__}: only Block is read, "
            "which normalises first and puts the MLP after attention"
        )
    if type(block.attn) is not Attention:
        raise UnsupportedModelError(
            f"{where} has {type(block.attn).__name__}: only Attention is read, one plain softmax"
        )
    if not block.attn.fused_attn:
        _check_logits(where, block.attn)
    if type(block.attn.qkv) is not nn.Linear:
        raise UnsupportedModelError(
            f"{where} projects queries by {_class_name(block.attn.qkv)}: "
            "only a plain Linear can be split into queries and keys"
        )
    if type(block.mlp) not in _TOKENWISE_MLPS:
        raise UnsupportedModelError(
            f"{where} has {type(block.mlp).__name__}, which may mix tokens: "
            f"only {', '.join(mlp.__name__ for mlp in _TOKENWISE_MLPS)} are read"
        )
    if not _linears(block.mlp):
        raise UnsupportedModelError(f"{where} has an MLP without Linear layers")
    # Slimmed, these modules are not called: what hangs on their calls would be lost.
    for name, module in (("", block), (".attn", block.attn), (".attn.qkv", block.attn.qkv)):
        reason = altered(where + name, module, deep=False)
        if reason is not None:
            raise UnsupportedModelError(f"{reason}, which would not run: remove them first")
    if not isinstance(block.attn.qkv.weight, nn.Parameter):
        raise UnsupportedModelError(
            f"{where}.attn.qkv computes its weight anew in each call: make it a parameter first"
        )


def _check_logits(where: str, attn: Attention) -> None:
    """What timm computes step by step is computed at once here."""
    if attn.scale != attn.head_dim**-0.5:
        raise UnsupportedModelError(
            f"{where}.attn scales logits by {attn.scale:g}: only 1 / sqrt(head_dim) = "
            f"{attn.head_dim**-0.5:g} is implemented"
        )
    if not only_drops(attn.attn_drop):
        raise UnsupportedModelError(
            f"{where}.attn.attn_drop is more than dropout and would not run: remove it first"
        )


def _class_name(module: nn.Module) -> str:
    kind = type(module)
    whole = f"{kind.__module__}.{kind.__name__}"
    return whole if kind.__name__ == nn.Linear.__name__ else kind.__name__


def check_masks(masks: Masks, model_spec: Spec) -> None:
    """Refuse masks that do not fit the model.

    Raises:
        MasksError: another model, image size, depth, grid or prefix, or a head token is pruned.
    """
    if masks.model and masks.model != model_spec.name:
        raise MasksError(f"masks are of model {masks.model}, got model {model_spec.name}")
    if masks.image_size is not None and masks.image_size != model_spec.image_size:
        raise MasksError(
            f"masks are of image size {masks.image_size}, the model takes {model_spec.image_size}"
        )
    wanted = [model_spec.depth, model_spec.tokens]
    if list(masks.keep.shape) != wanted:
        raise MasksError(f"keep must be [L, N] = {wanted}, got {list(masks.keep.shape)}")
    if masks.grid != model_spec.grid or masks.prefix != model_spec.prefix:
        raise MasksError(
            f"masks have grid {masks.grid} and {masks.prefix} prefix tokens, "
            f"the model has {model_spec.grid} and {model_spec.prefix}"
        )
    if not masks.keep[:, : model_spec.head_tokens].all():
        raise MasksError(
            f"the head reads the first {model_spec.head_tokens} tokens, "
            "every block must keep them, the last block prunes one"
        )


def block_parts(model: nn.Module) -> list[BlockParts]:
    """The modules of every block, first block first."""
    return [parts(block) for block in model.blocks]


def block_module(model: nn.Module, layer: int) -> nn.Module:
    """Block `layer`, counted from 1, as a module."""
    return model.blocks[layer - 1]


def parts(block: nn.Module) -> BlockParts:
    """The modules of one timm Block."""
    attn = block.attn
    return BlockParts(
        norm1=block.norm1,
        qkv=attn.qkv,
        q_norm=attn.q_norm,
        k_norm=attn.k_norm,
        gate=getattr(attn, "gate", None),
        attn_norm=attn.norm,
        proj=attn.proj,
        proj_drop=attn.proj_drop,
        ls1=block.ls1,
        drop_path1=block.drop_path1,
        norm2=block.norm2,
        mlp=block.mlp,
        ls2=block.ls2,
        drop_path2=block.drop_path2,
        heads=attn.num_heads,
        head_dim=attn.head_dim,
        attn_drop=attn.attn_drop.p if isinstance(attn.attn_drop, nn.Dropout) else 0.0,
    )


def slim_blocks(model: nn.Module) -> nn.Module:
    """The blocks of a slimmed model, which are called one by one.

    Raises:
        UnsupportedModelError: hooks of the container would not run.
    """
    _refuse_lost("blocks", model.blocks)
    return model.blocks


def call_block(
    block: nn.Module, compute: Callable[[BlockParts, Tensor], Tensor], x: Tensor
) -> Tensor:
    """`compute` of a block's parts and tokens x [m, B, D], in the place of the block's own.

    What hangs on calls of the block, hooks, FSDP or checkpointing, works as ever.

    Raises:
        UnsupportedModelError: the block was replaced or has a forward set on it, or its attention,
            which is not called, has hooks or a forward.
    """
    if not isinstance(unwrapped(block), Through):
        raise UnsupportedModelError(
            f"a slimmed model computes the blocks that it was made with, got {type(block).__name__}"
        )
    if "forward" in vars(block):
        raise UnsupportedModelError("a block has a forward set on it, which would not run")
    return block(x, compute=partial(_with_parts, compute))


def _with_parts(
    compute: Callable[[BlockParts, Tensor], Tensor], block: nn.Module, x: Tensor
) -> Tensor:
    _refuse_lost("block.attn", block.attn)
    if not block.attn.fused_attn:
        _refuse_lost("block.attn.attn_drop", block.attn.attn_drop)
    return compute(parts(block), x)


def _refuse_lost(name: str, module: nn.Module) -> None:
    reason = altered(name, module, deep=False)
    if reason is not None:
        raise UnsupportedModelError(
            f"{reason}, which would not run in a slimmed model: blocks, their norms and their "
            "layers are called"
        )


def check_shape(model: nn.Module, images: Tensor) -> None:
    """Refuse images that are not of the model's size.

    Raises:
        SlimvitError: they are not.
    """
    embedding = model.patch_embed
    check_image_shape(images, (embedding.proj.in_channels, *embedding.img_size))


def check_image_shape(images: Tensor, image_shape: tuple[int, ...]) -> None:
    """Refuse images that are not [B, C, H, W] of these channels, height and width.

    Raises:
        SlimvitError: they are not.
    """
    refuse_symbols(images)
    if images.dim() != 4 or images.shape[1:] != image_shape:
        sides = ", ".join(map(str, image_shape))
        raise SlimvitError(f"images must be [B, {sides}], got {list(images.shape)}")


def refuse_symbols(images: object) -> None:
    """Refuse torch.fx's stand-ins for images.

    Raises:
        SlimvitError: they are.
    """
    if isinstance(images, fx.Proxy):
        raise SlimvitError("slimmed models cannot be traced symbolically: use torch.export")


def embed(model: nn.Module, images: Tensor) -> Tensor:
    """Z_0: images [B, C, H, W] to tokens [B, N, D], position embedding and pre-norm included."""
    check_shape(model, images)
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


def model_name(model: nn.Module) -> str:
    """timm's architecture name, or the class name of a model built by hand."""
    config = getattr(model, "pretrained_cfg", None) or {}
    architecture = config.get("architecture") if hasattr(config, "get") else None
    return architecture or type(model).__name__
