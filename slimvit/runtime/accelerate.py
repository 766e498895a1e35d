"""The slimmed model for inference: fused where a back end can, same call, same outputs."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from slimvit.backends import choose
from slimvit.errors import SlimvitError, UsageError
from slimvit.masks import Masks
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
        if not x.is_floating_point():
            raise SlimvitError(f"images must be floating point, got {_name(x.dtype)}")
        return x.to(self.network.cls_token.dtype)

    def extra_repr(self) -> str:  # noqa: D102
        return f"backend={self.backend}, precision={self.precision}, kept={self.masks.counts}"


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
    backend = choose(backend, token.device, PRECISIONS[precision])
    slim.fold()
    slim.to(PRECISIONS[precision])
    return AcceleratedViT(slim, backend).eval().requires_grad_(False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
