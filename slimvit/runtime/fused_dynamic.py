"""The model that chooses its tokens for each image, for GPUs: nothing waits for the host."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimvit.backends.fused_checks import tf32_allowed
from slimvit.dynamic import Planner
from slimvit.ops import ChooserParts, FusedDynamicNetwork, NetworkParts
from slimvit.runtime.accelerated import AcceleratedViT
from slimvit.runtime.fused import FusedViT


class FusedDynamicViT(FusedViT):
    """A model with a dynamic plan whose weights are folded for fused kernels in one precision.

    Args:
        network: the dense network, folded; taken apart.
        plan: the bound plan.
        choosers: how each of its blocks chooses; see `choosers_of`.
        parts: the dense network.
        dtype: what it computes in.
        backend: whose kernels, "triton" or "cuda".
        image_shape: channels, height and width of the images.
    """

    def __init__(
        self,
        network: nn.Module,
        plan: Planner,
        choosers: list[ChooserParts | None],
        parts: NetworkParts,
        dtype: torch.dtype,
        backend: str,
        image_shape: tuple[int, int, int],
    ) -> None:
        AcceleratedViT.__init__(self, network, backend, image_shape)
        tf32 = tf32_allowed()
        self.masks = None
        self.fused = FusedDynamicNetwork(parts, plan.counts, choosers, dtype, tf32, backend)
        network.keep_head()
        network.to(dtype)
        network.plan = plan

    def forward_features(self, images: Tensor) -> Tensor:
        """Kept tokens after the final norm in each image's own places, [B, N, D], else zero."""
        tokens, places = self.fused.with_places(self._checked(images))
        length = self.plan.tokens
        features = torch.ops.slimvit.scatter_tokens(
            tokens, places[-1], length + len(self.plan.acts_before), self.backend
        )
        return features[:, :length].to(images.dtype)  # packages stand nowhere and are left out

    def kept_sets(self, images: Tensor) -> list[Tensor]:
        """Places of the tokens that each block keeps of images [B, C, H, W]: L of [B, n], int64.

        N and more are package tokens, which stand nowhere.
        """
        return self.fused.with_places(self._checked(images))[1]
