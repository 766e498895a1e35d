"""A model with a plan for CPUs: all of it in one call of the C++ kernels, choosing included."""

from __future__ import annotations

from torch import Tensor

from slimvit.ops import scatter_tokens
from slimvit.runtime.packed import PackedViT


class PackedDynamicViT(PackedViT):
    """A slimmed model whose plan chooses tokens for each image, packed for one processor."""

    def forward_features(self, images: Tensor) -> Tensor:
        """Kept tokens after the final norm, each image in its own places: [B, N, D], else zero.

        A package token stands in no place and is left out.
        """
        tokens, kept = self.packed.kept(self._cast_images(images))
        count = self.packed.tokens
        features = scatter_tokens(tokens, kept[-1].clamp(max=count), count + 1)
        return features[:, :count].to(images.dtype)

    def kept_sets(self, images: Tensor) -> list[Tensor]:
        """Places of the tokens that each block keeps of images [B, C, H, W]: L of [B, n], int64.

        N and more are package tokens, which stand nowhere. Where each image keeps a number of its
        own, -1 fills up those of fewer.
        """
        kept = self.packed.kept(self._cast_images(images))[1]
        if not self.packed.ragged:
            return kept
        return [places[:, (places >= 0).any(0)] for places in kept]
