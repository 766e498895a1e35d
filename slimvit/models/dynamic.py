"""The forward of a model that chooses its tokens for each image, mixed into a timm class."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from slimvit.errors import PlanError, UnsupportedModelError
from slimvit.models.slim import SlimmedViT, base_of
from slimvit.models.vision_transformer import call_block, check_shape, embed, slim_blocks
from slimvit.ops import Alive, BlockParts, dynamic_block, scatter_tokens
from slimvit.ops.modules import through


class _Dynamic(SlimmedViT):
    """What a dynamically slimmed model does differently from the timm class it is mixed into."""

    plan: nn.Module
    masks = None
    _taken = ("plan", "_told")

    def set_plan(self, plan: nn.Module) -> None:
        """Take a bound planner; its weights are part of this model from now on, as `plan`.

        Those of a plan that does not learn want no gradient: none would come, and
        DistributedDataParallel would wait for it.
        """
        if not plan.learns:
            plan.requires_grad_(False)
        # Of each block what it receives and keeps: not all properties can be read by torch.compile.
        self._told = list(zip(plan.alive, plan.counts, strict=True))
        for block in self.blocks:
            for module in (block, block.norm1, block.norm2, block.mlp):
                through(module)
        self.plan = plan.to(self.cls_token.device, self.cls_token.dtype).train(self.training)

    def _slim_tokens(self, images: Tensor) -> Alive:
        """Kept tokens after the final norm with their places."""
        alive = self._blocks(images)
        return alive._replace(x=self.norm(alive.x))

    def no_weight_decay(self) -> set[str]:
        """What timm names of the model, and norms and biases of the plan, whatever their shape."""
        own = (name for name, _ in self.plan.named_parameters(prefix="plan"))
        return {
            *super().no_weight_decay(),
            *(name for name in own if "norm" in name or name.endswith("bias")),
        }

    def kept_sets(self, images: Tensor) -> list[Tensor]:
        """Places of the tokens that each block keeps of each image: L of [B, n].

        In training, what `SPViT` prunes stays a row, and its place is among them.
        """
        if self._goes_one_by_one(images):
            alone = [self.kept_sets(image) for image in images.split(1)]
            sets = [[places[0] for places in block] for block in zip(*alone, strict=True)]
            return [pad_sequence(block, batch_first=True, padding_value=-1) for block in sets]
        kept: list[Tensor] = []
        self._blocks(images, lambda alive: kept.append(alive.place))
        return kept

    def trace(self, images: Tensor) -> tuple[Tensor, list[Alive]]:
        """What training looks at: the logits, and the tokens that each block leaves, L of them."""
        left: list[Alive] = []
        alive = self._blocks(images, left.append)
        return self.forward_head(self.norm(alive.x).transpose(0, 1)), left

    def _blocks(self, images: Tensor, watch: Callable[[Alive], None] | None = None) -> Alive:
        x = embed(self, images).transpose(0, 1)  # [N, B, D]
        place = torch.arange(x.shape[0], device=x.device).expand(x.shape[1], -1)
        alive = Alive(x, place)
        for layer, module in enumerate(slim_blocks(self)):
            if self.grad_checkpointing and self.training:
                alive = checkpoint(self._layer, alive, layer, module, use_reentrant=False)
            else:
                alive = self._layer(alive, layer, module)
            if watch is not None:
                watch(alive)
        return alive

    def _layer(self, alive: Alive, layer: int, module: nn.Module) -> Alive:
        received = self.plan.before(layer, alive)
        if not isinstance(received, Alive):
            raise PlanError(f"before must give an Alive, got {type(received).__name__}")
        left = self.block(layer, received, module)
        if not (self.training or self.plan.ragged or torch.jit.is_tracing()):
            self._check_counts(layer, len(received.x), len(left.x))
        return left

    def _check_counts(self, layer: int, received: int, left: int) -> None:
        """Refuse a plan that does other work than it says: MACs are counted by what it says."""
        alive, counts = self._told[layer]
        if (received, left) != (alive, counts):
            raise PlanError(
                f"{self.plan.kind}: block {layer + 1} must make {counts} tokens of {alive}, as "
                f"`counts` and `alive` say and work is counted, got {left} of {received}: let "
                "`before` and `count` agree with them, or `ragged` be true"
            )

    def block(self, layer: int, alive: Alive, module: nn.Module | None = None) -> Alive:
        """What block `layer`, counted from 0, makes of the tokens that it receives."""
        received = alive.x.shape[0]
        if torch.jit.is_tracing():  # sizes are tensors there
            received = int(received)
        module = self.blocks[layer] if module is None else module
        n = self.plan.count(layer, received)
        left: list[Alive] = []  # beside the tokens, which the block is called with

        def compute(block: BlockParts, x: Tensor) -> Tensor:
            left[:] = [
                dynamic_block(
                    alive._replace(x=x),
                    block,
                    n,
                    partial(self.plan.choose, layer),
                    prefix=self.plan.prefix,
                    head_tokens=self.plan.spec.head_tokens,
                    # slimvit's own planners choose rightly by construction
                    check_places=not type(self.plan).choose.__module__.startswith("slimvit."),
                )
            ]
            return left[0].x

        x = call_block(module, compute, alive.x)
        return left[0]._replace(x=x)

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Kept tokens after the final norm, each image's in its own places: [B, N, D], else zero.

        A package token stands in no place and is left out.
        """
        self._refuse_attention_mask(attn_mask, is_causal)
        if self._goes_one_by_one(x):
            return torch.cat([self.forward_features(image) for image in x.split(1)])
        alive = self._slim_tokens(x)
        tokens = self.plan.tokens
        place = alive.place.clamp(max=tokens)
        return scatter_tokens(alive.x.transpose(0, 1), place, tokens + 1)[:, :tokens]

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]; nothing is scattered on the way."""
        self._refuse_attention_mask(attn_mask, is_causal)
        if self._goes_one_by_one(x):
            return torch.cat([self.forward(image) for image in x.split(1)])
        return self.forward_head(self._slim_tokens(x).x.transpose(0, 1))

    def _goes_one_by_one(self, images: Tensor) -> bool:
        """Whether images keep numbers of their own, which tensors of a batch cannot."""
        check_shape(self, images)
        if self.plan.ragged:
            _refuse_one_shape(images)
        return self.plan.ragged and not self.training and len(images) > 1

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _rebuild, (base_of(type(self)),), self.__getstate__()


def _refuse_one_shape(images: Tensor) -> None:
    """Refuse what computes any images by the shapes of some, where each image has its own."""
    if torch.jit.is_tracing():
        name = "torch.jit.trace"
    elif torch.compiler.is_exporting():
        name = "torch.export"
    elif torch._C._functorch.is_functorch_wrapped_tensor(images):
        name = "torch.func"
    else:
        return
    raise UnsupportedModelError(
        f"{name} would take the numbers of patches of one image for those of all: "
        "with this plan each image keeps a number of its own"
    )


@functools.cache
def dynamic_class(base: type[nn.Module]) -> type[nn.Module]:
    """`base` with the dynamic forward mixed in: same modules and calls, and a `plan`."""
    return type(f"Dynamic{base.__name__}", (_Dynamic, base), {"__module__": __name__})


def _rebuild(base: type[nn.Module]) -> Any:
    cls = dynamic_class(base)
    return cls.__new__(cls)
