"""The slimmed model for inference: fused where a back end can, same call, same outputs."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from slimvit.backends import choose
from slimvit.errors import SlimvitError, UsageError
from slimvit.masks import Masks
from slimvit.ops import NetworkParts, PackedNetwork, why_not_packed
from slimvit.runtime.apply_masks import apply_masks

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class AcceleratedViT(nn.Module):
    """A slimmed model for inference. It takes images of any floating dtype and answers in it.

    Attributes:
        masks: the kept sets.
        backend: the back end that computes.
        num_classes: outputs of the head.
    """

    def __init__(self, network: nn.Module, backend: str) -> None:
        super().__init__()
        self.network = network
        self.masks: Masks = network.masks
        self.backend = backend
        self.num_classes: int = network.num_classes

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        return self.network(self._cast(images)).to(images.dtype)

    def forward_features(self, images: Tensor) -> Tensor:
        """Kept tokens after the final norm in their places, [B, N, D], zero elsewhere."""
        return self.network.forward_features(self._cast(images)).to(images.dtype)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, classes] of features [B, N, D]."""
        out = self.network.forward_head(self._cast(features), pre_logits=pre_logits)
        return out.to(features.dtype)

    def train(self, mode: bool = True) -> AcceleratedViT:
        """Stay in evaluation mode: train what `apply_masks` returns, then accelerate it."""
        return super().train(False)

    @property
    def precision(self) -> str:
        """The dtype that the network computes in, by name; `.to(dtype)` changes it."""
        return _name(self.network.cls_token.dtype)

    def _cast(self, x: Tensor) -> Tensor:
        _check_floating(x)
        return x.to(self.network.cls_token.dtype)

    def extra_repr(self) -> str:  # noqa: D102
        return f"backend={self.backend}, precision={self.precision}, kept={self.masks.counts}"


class PackedViT(AcceleratedViT):
    """A slimmed model whose weights are packed for one processor and one precision.

    Attributes:
        packed: the network in front of the head.
    """

    def __init__(self, network: nn.Module, parts: NetworkParts, dtype: torch.dtype) -> None:
        super().__init__(network, "cpu")
        self.packed = PackedNetwork(parts, dtype)
        network.keep_head()
        network.to(dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        if self.packed.classes:
            return self.packed(self._cast_images(images)).to(images.dtype)
        tokens = self.packed.forward_tokens(self._cast_images(images))
        return self.network.forward_head(self._cast(tokens)).to(images.dtype)

    def forward_features(self, images: Tensor) -> Tensor:
        """Kept tokens after the final norm in their places, [B, N, D], zero elsewhere."""
        tokens = self.packed.forward_tokens(self._cast_images(images))
        return self.network.scatter(tokens).to(images.dtype)

    @property
    def precision(self) -> str:
        """The dtype that the network computes in, by name."""
        return _name(self.packed.dtype)

    def _cast_images(self, images: Tensor) -> Tensor:
        _check_floating(images)
        if images.device.type not in ("cpu", "meta"):
            raise SlimvitError(f"back end cpu takes images on the CPU, got {images.device}")
        return images if images.dtype in (torch.float32, torch.bfloat16) else images.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedViT:
        probe = self.network.cls_token
        moved = fn(probe)
        if (moved.dtype, moved.device) != (probe.dtype, probe.device):
            raise SlimvitError(
                f"weights are packed for {self.precision} on the CPU, got {_name(moved.dtype)} on "
                f"{moved.device}: accelerate the model anew, or with backend='torch'"
            )
        return super()._apply(fn, recurse)


def accelerate(
    model: nn.Module,
    masks: Masks | str | os.PathLike[str],
    *,
    backend: str = "auto",
    precision: str | None = None,
) -> AcceleratedViT:
    """The slimmed model for inference; the given model is not changed.

    Args:
        model: a timm VisionTransformer; its device is where the result runs.
        masks: kept sets, or the path of a masks file.
        backend: "torch", "cpu", "triton", "cuda", or "auto" for the fastest that works here.
        precision: "float32", "bfloat16" or "float16"; None keeps the model's own.

    Returns:
        A module with timm's calls (`forward`, `forward_features`, `forward_head`,
        `num_classes`) that answers like `apply_masks(model, masks).eval()`.

    Raises:
        UnsupportedModelError: the model cannot be slimmed.
        MasksError: the masks are wrong or do not fit the model.
        SlimvitError: the back end or the precision cannot run here; the message says why.
    """
    slim = apply_masks(model, masks)
    token = slim.cls_token
    precision = _name(token.dtype) if precision is None else precision
    if precision not in PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    dtype = PRECISIONS[precision]
    slim.fold()
    parts = slim.network_parts()

    def refuses(name: str) -> str | None:
        if name == "torch":
            return None
        return parts if isinstance(parts, str) else why_not_packed(parts)

    backend = choose(backend, token.device, dtype, refuses)
    if backend == "cpu":
        fast: AcceleratedViT = PackedViT(slim, parts, dtype)
    else:
        fast = AcceleratedViT(slim.to(dtype), backend)
    return fast.eval().requires_grad_(False)


def _check_floating(images: Tensor) -> None:
    if not images.is_floating_point():
        raise SlimvitError(f"images must be floating point, got {_name(images.dtype)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
