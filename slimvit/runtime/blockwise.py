"""A model with a plan that acts between blocks, for CPUs: each block a call of the C++ kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from slimvit.backends import cpu
from slimvit.models import embed
from slimvit.ops import Alive, NetworkParts, PackedNetwork, pack_block, scatter_tokens
from slimvit.runtime.accelerated import AcceleratedViT
from slimvit.runtime.packed import PackedViT


class BlockwiseViT(PackedViT):
    """A slimmed model whose plan removes tokens between blocks, as SPViT's selectors do.

    The embedding and the blocks ahead of the plan's first are one call; then the plan, in PyTorch
    and float32, and the packed blocks take turns. For plans whose `choose` has nothing to do.

    Args:
        network: what `apply_masks(model, plan)` gives; taken apart.
        parts: the dense network, folded.
        dtype: what blocks compute in: float32, or bfloat16 accumulated in float32.
        image_shape: channels, height and width of the images.
    """

    def __init__(
        self,
        network: nn.Module,
        parts: NetworkParts,
        dtype: torch.dtype,
        image_shape: tuple[int, int, int],
    ) -> None:
        AcceleratedViT.__init__(self, network, "cpu", image_shape)
        plan, depth = network.plan, len(parts.blocks)
        self._first = min(plan.acts_before, default=depth)
        ahead = parts._replace(
            blocks=parts.blocks[: self._first],
            counts=plan.counts[: self._first],
            norm=nn.Identity(),
            heads=[],
        )
        self.packed = PackedNetwork(ahead, dtype)
        blocks = [
            pack_block(block, None, dtype, lone=n <= 2)
            for block, n in zip(parts.blocks[self._first :], plan.counts[self._first :])
        ]
        for layer, pack in enumerate(cpu.join(blocks) if blocks else [], self._first):
            self.register_buffer(f"block_{layer}", pack, persistent=False)
        self._depth = depth
        network.blocks = nn.ModuleList()
        if self._first:
            network.patch_embed = network.pos_embed = None
        network.float()

    def _logits(self, images: Tensor) -> Tensor:
        return self.network.forward_head(self._tokens(images).x.transpose(0, 1))

    def forward_features(self, images: Tensor) -> Tensor:
        """Kept tokens after the final norm in their places, [B, N, D], zero elsewhere."""
        alive, tokens = self._tokens(images), self.plan.tokens
        place = alive.place.clamp(max=tokens)  # a package stands nowhere and is left out
        features = scatter_tokens(alive.x.transpose(0, 1), place, tokens + 1)
        return features[:, :tokens].to(images.dtype)

    def kept_sets(self, images: Tensor) -> list[Tensor]:
        """Places of the tokens that each block keeps of images [B, C, H, W]: L of [B, n], int64.

        N and more are package tokens, which stand nowhere.
        """
        kept: list[Tensor] = []
        self._blocks(self._cast_images(images), lambda alive: kept.append(alive.place))
        return kept

    def _tokens(self, images: Tensor) -> Alive:
        alive = self._blocks(self._cast_images(images))
        return alive._replace(x=self.network.norm(alive.x))

    def _blocks(self, images: Tensor, watch: Callable[[Alive], None] = lambda _: None) -> Alive:
        if self._first:
            x = self.packed.forward_tokens(images).transpose(0, 1)  # [N, B, D]
        else:
            x = embed(self.network, images.float()).transpose(0, 1)
        place = torch.arange(self.plan.tokens, device=x.device).expand(x.shape[1], -1)
        alive = Alive(x, place[:, : x.shape[0]])
        for layer in range(self._first):
            watch(alive._replace(place=place[:, : self.plan.counts[layer]]))
        for layer in range(self._first, self._depth):
            alive = self.block(layer, self.plan.before(layer, alive))
            watch(alive)
        return alive

    def block(self, layer: int, alive: Alive) -> Alive:
        """What block `layer`, counted from 0, makes of the tokens that it receives."""
        n = self.plan.count(layer, alive.x.shape[0])
        pack = self._buffers[f"block_{layer}"]
        x = torch.ops.slimvit.slim_block(alive.x, pack, n, None, alive.key_bias)
        return Alive(x, alive.place[:, :n], None if alive.size is None else alive.size[:, :n])
