"""From a PIL image to the tensor that a model expects, by timm's rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from slimvit.errors import UsageError

Transform = Callable[[Image.Image], Tensor]


def image_transform(
    model_or_cfg: Any, training: bool = False, *, img_size: int | tuple[int, int] | None = None
) -> Transform:
    """A model's transform by timm: resize, crop, normalise; in training a light augmentation.

    Args:
        model_or_cfg: a timm model, or its `pretrained_cfg` as a dict.
        training: random resized crop (scale 0.6 to 1) and flip: light enough for a few hundred
            images.
        img_size: side, or (height, width), in pixels; by default what the model was built for.

    Returns:
        A picklable function from a PIL image to [C, H, W], float32.

    Raises:
        UsageError: `model_or_cfg` is neither a model nor a configuration.
    """
    cfg, chans, size = _describe(model_or_cfg)
    if img_size is not None:
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
    config = resolve_data_config({"input_size": (chans, *size)}, pretrained_cfg=cfg)
    if len(config["mean"]) != chans:
        for key in ("mean", "std"):
            config[key] = (sum(config[key]) / len(config[key]),) * chans
    if not training:
        return create_transform(**config)
    del config["crop_mode"]  # of evaluation only
    config |= {"is_training": True, "scale": (0.6, 1.0), "color_jitter": None}
    return create_transform(**config)


def _describe(model_or_cfg: Any) -> tuple[dict[str, Any], int, tuple[int, int]]:
    """Pretrained configuration, channels and (height, width) of a model or of a configuration."""
    if isinstance(model_or_cfg, dict):
        chans, height, width = model_or_cfg.get("input_size") or (3, 224, 224)
        return model_or_cfg, chans, (height, width)
    if not hasattr(model_or_cfg, "pretrained_cfg"):
        kind = type(model_or_cfg).__name__
        raise UsageError(f"model_or_cfg must be a timm model or its pretrained_cfg, got {kind}")
    cfg = dict(getattr(model_or_cfg, "pretrained_cfg", None) or {})
    if (shape := getattr(model_or_cfg, "image_shape", None)) is not None:  # an accelerated model
        return cfg, shape[0], shape[1:]
    chans, height, width = cfg.get("input_size") or (3, 224, 224)
    embed = getattr(model_or_cfg, "patch_embed", None)
    height, width = getattr(embed, "img_size", None) or (height, width)
    return cfg, getattr(getattr(embed, "proj", None), "in_channels", chans), (height, width)
