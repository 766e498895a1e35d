"""Slimmed models that run: a trainable one, and a fast one for inference."""

from slimvit.runtime.accelerate import PRECISIONS, AcceleratedViT, accelerate
from slimvit.runtime.apply_masks import apply_masks

__all__ = ["PRECISIONS", "AcceleratedViT", "accelerate", "apply_masks"]
