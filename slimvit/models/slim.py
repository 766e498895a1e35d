"""The slimmed forward, mixed into the class of a timm model."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import LayerScale, Mlp, VisionTransformer
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from slimvit.backends.packed_linear import PatchLinear
from slimvit.errors import UnsupportedModelError
from slimvit.masks import Masks
from slimvit.models.copying import copied
from slimvit.models.vision_transformer import call_block, check_shape, embed, parts, slim_blocks
from slimvit.ops import (
    BlockParts,
    ExtraKey,
    FoldedBlock,
    NetworkParts,
    scatter_tokens,
    slim_block,
    zero_key,
)
from slimvit.ops.modules import Through, altered, only_drops, through, without_through


class SlimmedViT(nn.Module):
    """A slimmed model: timm's class with another forward, mixed into it by `apply_masks`.

    Attributes:
        masks: the kept sets, or None where a dynamic plan chooses them.
        plan: the dynamic plan, with the weights that it learns, or None.
    """

    masks: Masks | None
    plan: Any
    _taken: tuple[str, ...]

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: kept tokens make no full grid of features."""
        raise UnsupportedModelError(
            "a slimmed model has no intermediate features on the full grid: "
            "call forward_features, or forward_intermediates of the dense model"
        )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head of `num_classes` outputs, which reads what the old one read."""
        if global_pool not in (None, self.global_pool):
            raise UnsupportedModelError(
                f"a slimmed model keeps global_pool={self.global_pool!r}, got {global_pool!r}: "
                "its last block computes only what the head reads"
            )
        super().reset_classifier(num_classes)

    @property
    def kept(self) -> Any:
        """What it keeps: its masks, or its plan."""
        return self.plan if self.masks is None else self.masks

    def kept_sets(self, images: Tensor) -> list[Tensor]:
        """Places of the tokens that each block keeps of images [B, C, H, W]: L of [B, n], int64.

        Prefix tokens come first; N and more are package tokens, which stand nowhere. Where each
        image keeps a number of its own, -1 fills up those of fewer.
        """
        raise NotImplementedError

    def dense(self) -> nn.Module:
        """A copy of this model as timm has it, in the class that it was slimmed from.

        Its weights are those of now; masks, or the plan with its own weights, stay behind.
        """
        if getattr(self, "_folded", False):
            raise UnsupportedModelError("an accelerated model is folded: no dense one is left")
        model = copied(self)
        for name in self._taken:
            delattr(model, name)
        model.__class__ = base_of(type(self))
        for module in model.modules():
            if isinstance(module, Through):
                module.__class__ = without_through(type(module))
        return model

    get_intermediate_layers = forward_intermediates
    prune_intermediate_layers = forward_intermediates

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Refused: what is kept belongs to one image size."""
        raise UnsupportedModelError(
            "what is kept belongs to one image size: resize the dense model, prune again"
        )

    @staticmethod
    def _refuse_attention_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
        if not isinstance(attn_mask, fx.Proxy) and (attn_mask is not None or is_causal):
            raise UnsupportedModelError("a slimmed model takes no attn_mask and is not causal")


class _Slim(SlimmedViT):
    """The forward with static masks."""

    masks: Masks
    _order: Tensor
    _taken = ("masks", "plan", "_counts", "_idle", "_dead", "_folded", "_order")

    def set_masks(self, masks: Masks) -> None:
        self.plan = None
        self.masks = masks.replace()  # a copy, whose tensors nobody else writes to
        self._counts = masks.counts
        self._idle = masks.semantics == "idle"
        self._dead = [masks.tokens - m if masks.semantics == "zero" else 0 for m in masks.alive]
        self._folded = False
        order = masks.order.to(self.cls_token.device)
        self.register_buffer("_order", order, persistent=False)
        for block in self.blocks:
            through(block)

    def _restore_order(self) -> None:
        """Put the order beside the weights again, where those were made anew without it."""
        order, device = self.masks.order, self.cls_token.device
        if self._order.device != device:
            self._order = order.to(device)
        else:  # in its place, which may be shared
            with torch.inference_mode():
                self._order.copy_(order)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Slim:
        super()._apply(fn, recurse)
        self._restore_order()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._restore_order()

    def _slim_tokens(self, images: Tensor) -> Tensor:
        """Tokens after the final norm in lifetime order, [n_L, B, D] ([N, B, D] where idle)."""
        x = embed(self, images).transpose(0, 1).index_select(0, self._order)  # [N, B, D]
        for layer, module in enumerate(slim_blocks(self)):
            if self.grad_checkpointing and self.training:
                x = checkpoint(self._slim_layer, x, layer, module, use_reentrant=False)
            else:
                x = self._slim_layer(x, layer, module)
        return self.norm(x)

    def _slim_layer(self, x: Tensor, layer: int, module: nn.Module) -> Tensor:
        n = self._counts[layer]
        if isinstance(module, FoldedBlock):
            out = module(x, n, self._extra_key(layer))
        else:
            out = call_block(module, partial(self._slim_block, layer), x)
        return torch.cat([out, x[n:]]) if self._idle and n < x.shape[0] else out

    def _slim_block(self, layer: int, block: BlockParts, x: Tensor) -> Tensor:
        return slim_block(x, block, self._counts[layer], extra_key=self._extra_key(layer, block))

    def _extra_key(self, layer: int, block: BlockParts | None = None) -> ExtraKey | None:
        if not self._dead[layer]:
            return None
        if block is not None and not self._folded:
            return zero_key(block, self._dead[layer], self.cls_token)
        key, value = getattr(self, f"_zero_key_{layer}"), getattr(self, f"_zero_value_{layer}")
        return ExtraKey(key, value, math.log(self._dead[layer]))

    @torch.no_grad()
    def fold(self) -> None:
        """Keep only what inference needs; training is over after this.

        Layer scale goes into the projection before it, dropout goes away, the key of the zero
        rows becomes a constant, and plain blocks are computed with fewer calls. Blocks may share
        modules and weights, so that nothing is changed in place.
        """
        self.eval()
        for layer, module in enumerate(self.blocks):
            if self._dead[layer]:
                extra = zero_key(parts(module), self._dead[layer], self.cls_token)
                self.register_buffer(f"_zero_key_{layer}", extra.key)
                self.register_buffer(f"_zero_value_{layer}", extra.value)
            block = _without_scale(module)
            plain = FoldedBlock.why_not(parts(block)) is None
            self.blocks[layer] = FoldedBlock(parts(block)) if plain else block
        if PatchLinear.replaces(self.patch_embed.proj):
            self.patch_embed.proj = PatchLinear(self.patch_embed.proj)
        self._folded = True

    @torch.no_grad()
    def network_parts(self) -> NetworkParts | str:
        """What a back end needs to compute the folded network by itself, or why it cannot."""
        embedding = self.patch_embed
        reason = self._altered()
        if reason is not None:
            return reason
        if not isinstance(embedding.proj, PatchLinear):
            if type(embedding.proj) is not nn.Conv2d:
                return f"it embeds patches by {type(embedding.proj).__name__}, not a plain Conv2d"
            return "its patches overlap or leave gaps"
        if not isinstance(embedding.norm, nn.Identity):
            return "patches are normalised one by one"
        height, width = embedding.proj.patch
        if tuple(size % side for size, side in zip(embedding.img_size, (height, width))) != (0, 0):
            return "images are padded or cropped to whole patches"
        channels = embedding.proj.in_channels
        blank = self.cls_token.new_zeros(1, channels, *embedding.img_size)
        table = self._pos_embed(embedding(blank))[0]  # [N, D]
        return NetworkParts(
            image_size=tuple(embedding.img_size),
            patch_weight=embedding.proj.linear.weight.unflatten(1, (channels, height, width)),
            table=table.index_select(0, self._order),
            order=self._order,
            prefix=self.masks.prefix,
            norm_pre=self.norm_pre,
            blocks=[m if isinstance(m, FoldedBlock) else parts(m) for m in self.blocks],
            extra_keys=[
                self._extra_key(layer, None if isinstance(m, FoldedBlock) else parts(m))
                for layer, m in enumerate(self.blocks)
            ],
            zero_rows=self._dead,
            norm=self.norm,
            heads=self._plain_heads(),
            counts=self._counts,
            idle=self._idle,
        )

    def _altered(self) -> str | None:
        """What ahead of the head is more than its class and its weights say, or None."""
        for name in ("", "patch_embed", "pos_drop", "patch_drop", "norm_pre", "norm"):
            module = getattr(self, name) if name else self
            reason = altered(name or "the model", module, deep=bool(name))
            if reason is not None:
                return f"{reason}, which would not run"
        if not only_drops(self.pos_drop):
            return f"its pos_drop is {type(self.pos_drop).__name__}, not dropout"
        known = (VisionTransformer._pos_embed, VisionTransformerDistilled._pos_embed)
        if type(self)._pos_embed not in known or "_pos_embed" in vars(self):
            return "it has a _pos_embed of its own"
        for name in ("cls_token", "pos_embed", "reg_token"):
            value = getattr(self, name, None)
            if value is not None and not isinstance(value, nn.Parameter):
                return f"its {name} is no parameter, and may be computed anew in each call"
        return None

    def _plain_heads(self) -> list[nn.Linear]:
        """Linear heads, where they are all that `forward_head` calls; else nothing."""
        names = ["head"] + ["head_dist"] * isinstance(self, VisionTransformerDistilled)
        heads = [head for name in names if (head := getattr(self, name, None))]
        known = (VisionTransformer.forward_head, VisionTransformerDistilled.forward_head)
        own = type(self).forward_head not in known or "forward_head" in vars(self)
        called = nn.ModuleList([self.fc_norm, self.head_drop, *heads])
        plain = isinstance(self.fc_norm, nn.Identity) and only_drops(self.head_drop)
        plain = plain and all(type(head) is nn.Linear for head in heads)
        return heads if plain and not own and altered("head", called) is None else []

    def keep_head(self) -> None:
        """Drop everything ahead of the final norm: `forward_head` is all that still works."""
        self.patch_embed = self.pos_embed = self.reg_token = None
        self.cls_token = nn.Parameter(self.cls_token.new_zeros(()), requires_grad=False)
        self.blocks, self.norm_pre, self.norm = nn.ModuleList(), nn.Identity(), nn.Identity()
        for name in [name for name, _ in self.named_buffers() if name.startswith("_zero_")]:
            delattr(self, name)

    def kept_sets(self, images: Tensor) -> list[Tensor]:
        """Places of the tokens that each block keeps, the same for all images: L of [B, n]."""
        check_shape(self, images)
        return self.masks.places(images)

    def scatter(self, x: Tensor) -> Tensor:
        """Tokens in lifetime order, [B, n, D], back in their places: [B, N, D], zero elsewhere."""
        order = self._order[: x.shape[1]].to(x.device)
        return scatter_tokens(x, order, self.masks.tokens)

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Kept tokens after the final norm, back in their places: [B, N, D], zero elsewhere.

        With `idle` masks pruned tokens hold their last value instead of zero.
        """
        self._refuse_attention_mask(attn_mask, is_causal)
        return self.scatter(self._slim_tokens(x).transpose(0, 1))

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]; nothing is scattered on the way."""
        self._refuse_attention_mask(attn_mask, is_causal)
        return self.forward_head(self._slim_tokens(x).transpose(0, 1))

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _rebuild, (base_of(type(self)),), self.__getstate__()


def base_of(slimmed: type[nn.Module]) -> type[nn.Module]:
    """timm's class that a slimmed forward was mixed into."""
    mro = slimmed.__mro__
    return mro[mro.index(SlimmedViT) + 1]


@functools.cache
def slim_class(base: type[nn.Module]) -> type[nn.Module]:
    """`base` with the slimmed forward mixed in: same modules, same state dict, same interface."""
    return type(f"Slim{base.__name__}", (_Slim, base), {"__module__": __name__})


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = slim_class(base)
    return cls.__new__(cls)


def _without_scale(block: nn.Module) -> nn.Module:
    """The block with its layer scales in the layers before them, and its MLP a plain sequence."""
    block = _shallow(block)
    if _scales(block.ls1, block.attn.proj):
        block.attn = _shallow(block.attn)
        block.attn.proj, block.ls1 = _scaled(block.attn.proj, block.ls1), nn.Identity()
    mlp = block.mlp
    plain = (
        without_through(type(mlp)) is Mlp
        and isinstance(mlp.norm, nn.Identity)
        and altered("mlp", mlp) is None
    )
    if plain and only_drops(mlp.drop1) and only_drops(mlp.drop2):
        fc2 = mlp.fc2
        if _scales(block.ls2, fc2):
            fc2, block.ls2 = _scaled(fc2, block.ls2), nn.Identity()
        block.mlp = nn.Sequential(mlp.fc1, mlp.act, fc2)
    return block


def _shallow(module: nn.Module) -> nn.Module:
    """The same parts and parameters in a module of their own."""
    same = copy.copy(module)
    same._modules, same._parameters = dict(module._modules), dict(module._parameters)
    return same


def _scales(scale: nn.Module, linear: nn.Module) -> bool:
    """Whether a layer scale may go into the layer before it."""
    plain = type(scale) is LayerScale and type(linear) is nn.Linear
    return plain and altered("scale", scale) is None and altered("linear", linear) is None


def _scaled(linear: nn.Linear, scale: LayerScale) -> nn.Linear:
    scaled = _shallow(linear)
    scaled.weight = nn.Parameter(linear.weight * scale.gamma[:, None], requires_grad=False)
    if linear.bias is not None:
        scaled.bias = nn.Parameter(linear.bias * scale.gamma, requires_grad=False)
    return scaled
