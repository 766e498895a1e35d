"""The slimmed model for GPUs: fused kernels, one op for each block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from slimvit.checks import dtype_name
from slimvit.dynamic import Planner
from slimvit.errors import SlimvitError
from slimvit.models.vision_transformer import check_image_shape
from slimvit.ops import FusedNetwork
from slimvit.runtime.accelerated import (
    AcceleratedViT,
    check_floating,
    no_state,
    refuse_gradients,
)


class FusedViT(AcceleratedViT):
    """A slimmed model whose weights are folded for fused kernels in one precision.

    Attributes:
        fused: the network in front of the head.
    """

    def __init__(
        self,
        network: nn.Module,
        fused: FusedNetwork,
        image_shape: tuple[int, int, int],
        plan: Planner | None = None,
    ) -> None:
        super().__init__(network, fused.backend, image_shape)
        self.fused = fused
        network.keep_head()  # all that is left of it
        network.to(fused.dtype)
        if plan is not None:
            self.masks, network.plan = None, plan

    def _logits(self, images: Tensor) -> Tensor:
        return self.network.forward_head(self._tokens(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Kept tokens after the final norm in their places, [B, N, D], zero elsewhere."""
        tokens = self._tokens(images)
        order = self.fused.order[: tokens.shape[1]]
        return torch.ops.slimvit.scatter_tokens(tokens, order, self.masks.tokens, self.backend).to(
            images.dtype
        )

    def _tokens(self, images: Tensor) -> Tensor:
        return self.fused(self._checked(images))

    def _checked(self, images: Tensor) -> Tensor:
        check_floating(images)
        refuse_gradients(self.backend, images)
        check_image_shape(images, self.image_shape)
        return images

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedViT:
        probe = self.network.cls_token
        moved = fn(probe)
        if moved.dtype != probe.dtype:
            raise SlimvitError(
                f"weights are folded for {self.precision}, got {dtype_name(moved.dtype)}: "
                "accelerate the model anew with that precision, or with backend='torch'"
            )

        def moved_alone(tensor: Tensor) -> Tensor:
            """Sums and biases stay float32, and rows where kernels look for them."""
            moved = fn(tensor)
            return (moved if moved.dtype == tensor.dtype else tensor.to(moved.device)).contiguous()

        return super()._apply(moved_alone, recurse)

    def _load_from_state_dict(self, *_: object) -> None:
        raise SlimvitError(no_state(self.backend))
