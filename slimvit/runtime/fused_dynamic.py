"""The model that chooses its tokens for each image, for GPUs: nothing waits for the host."""

from __future__ import annotations

import torch
from torch import Tensor

from slimvit.runtime.fused import FusedViT


class FusedDynamicViT(FusedViT):
    """A model with a dynamic plan whose weights are folded for fused kernels in one precision."""

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
