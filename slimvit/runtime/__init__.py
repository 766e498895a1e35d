"""Slimmed models that run: a trainable one, and a fast one for inference."""

from slimvit.runtime._accelerate import PRECISIONS, accelerate
from slimvit.runtime._apply_masks import apply_masks
from slimvit.runtime.accelerated import AcceleratedViT

__all__ = ["PRECISIONS", "AcceleratedViT", "accelerate", "apply_masks"]
