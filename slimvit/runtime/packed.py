"""The slimmed model for CPUs: all of it in one call of the C++ kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from slimvit.errors import SlimvitError
from slimvit.ops import NetworkParts, PackedNetwork
from slimvit.runtime.accelerated import (
    AcceleratedViT,
    check_floating,
    dtype_name,
    no_state,
    refuse_gradients,
)


class PackedViT(AcceleratedViT):
    """A slimmed model whose weights are packed for one processor and one precision.

    Attributes:
        packed: the network in front of the head.
    """

    def __init__(
        self,
        network: nn.Module,
        parts: NetworkParts,
        dtype: torch.dtype,
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__(network, "cpu", image_shape)
        self.packed = PackedNetwork(parts, dtype)
        network.keep_head()
        network.to(dtype)

    def _logits(self, images: Tensor) -> Tensor:
        if self.packed.classes:
            return self.packed(self._cast_images(images))
        tokens = self.packed.forward_tokens(self._cast_images(images))
        return self.network.forward_head(self._cast(tokens))

    def forward_features(self, images: Tensor) -> Tensor:
        """Kept tokens after the final norm in their places, [B, N, D], zero elsewhere."""
        tokens = self.packed.forward_tokens(self._cast_images(images))
        return self.network.scatter(tokens).to(images.dtype)

    @property
    def precision(self) -> str:
        """The dtype that the network computes in, by name."""
        return dtype_name(self.packed.dtype)

    def _cast_images(self, images: Tensor) -> Tensor:
        check_floating(images)
        refuse_gradients(self.backend, images)
        if images.device.type not in ("cpu", "meta"):
            raise SlimvitError(f"back end cpu takes images on the CPU, got {images.device}")
        return images if images.dtype in (torch.float32, torch.bfloat16) else images.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedViT:
        probe = self.network.cls_token
        moved = fn(probe)
        if (moved.dtype, moved.device) != (probe.dtype, probe.device):
            raise SlimvitError(
                f"weights are packed for {self.precision} on the CPU, got "
                f"{dtype_name(moved.dtype)} on {moved.device}: accelerate the model anew, or with "
                "backend='torch'"
            )
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *_: object) -> None:
        raise SlimvitError(no_state(self.backend))
