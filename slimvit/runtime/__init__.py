"""Slimmed models that run: a trainable one, and a fast one for inference."""

from slimvit.runtime.accelerate import PRECISIONS, accelerate
from slimvit.runtime.accelerated import AcceleratedViT
from slimvit.runtime.apply_masks import apply_masks

__all__ = ["PRECISIONS", "AcceleratedViT", "accelerate", "apply_masks"]
