"""The slimmed model for CPUs: all of it in one call of the C++ kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimvit.checks import dtype_name
from slimvit.dynamic import Planner
from slimvit.errors import SlimvitError
from slimvit.ops import PackedNetwork
from slimvit.ops.modules import altered
from slimvit.runtime.accelerated import (
    AcceleratedViT,
    check_floating,
    no_state,
    refuse_gradients,
)


class PackedViT(AcceleratedViT):
    """A slimmed model whose weights are packed for one processor and one precision.

    A head that is replaced or changed later takes over from the packed one. What is written through
    `.data` is not noticed, nor what changes after the model was compiled or traced.

    Attributes:
        packed: the network, with its head where that is made of linear layers alone.
    """

    def __init__(
        self,
        network: nn.Module,
        packed: PackedNetwork,
        image_shape: tuple[int, int, int],
        plan: Planner | None = None,
    ) -> None:
        super().__init__(network, "cpu", image_shape)
        self.packed = packed
        network.keep_head()  # all that is left of it
        network.to(packed.dtype)
        self._packed_head = self._head() if packed.classes else None
        if plan is not None:
            self.masks, network.plan = None, plan

    def _head(self) -> list[tuple[nn.Module | Tensor, object]]:
        """The modules of the head and their types, its weights and how often each was written to.

        Parametrizations change the type of a module in place.
        """
        modules = [
            module
            for name in ("fc_norm", "head_drop", "head", "head_dist")
            if (module := getattr(self.network, name, None)) is not None
        ]
        weights = [weight for module in modules for weight in module.parameters()]
        return [(m, type(m)) for m in modules] + [(w, _version(w)) for w in weights]

    def _head_is_packed(self) -> bool:
        if self._packed_head is None or torch.compiler.is_compiling():
            return self._packed_head is not None
        now = self._head()
        return len(now) == len(self._packed_head) and all(
            part is packed and state == before and not _does_more(part)
            for (part, state), (packed, before) in zip(now, self._packed_head)
        )

    def _logits(self, images: Tensor) -> Tensor:
        if self._head_is_packed():
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

    def __getstate__(self) -> dict[str, Any]:
        kept = [] if self._head_is_packed() else None
        return {**super().__getstate__(), "_packed_head": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        device = self.packed.packs.device
        if device.type != "cpu":
            raise SlimvitError(f"back end cpu computes on the CPU, got weights to load to {device}")
        if self._packed_head is not None:  # a copy's weights are others
            self._packed_head = self._head()

    def _load_from_state_dict(self, *_: object) -> None:
        raise SlimvitError(no_state(self.backend))


def _version(weight: Tensor) -> int | None:
    """How often it was written to; tensors made in inference mode do not count."""
    return None if weight.is_inference() else weight._version


def _does_more(part: nn.Module | Tensor) -> bool:
    """Whether a module has hooks or another forward, or a weight is trained."""
    return part.requires_grad if isinstance(part, Tensor) else altered("head", part) is not None
