"""The digits model: a small timm VisionTransformer, and its weights that the package ships."""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import timm
from safetensors import safe_open
from torch import nn

from slimvit.demo._digits import CANVAS, MEAN, STD
from slimvit.files import atomic_write, tensor_bytes
from slimvit.models import load_checkpoint

NAME = "slimvit_digits"
WEIGHTS = "digits_vit.safetensors"
SHAPE: dict[str, Any] = {"patch_size": 4, "embed_dim": 96, "depth": 8, "num_heads": 3}


def build(patch_drop_rate: float = 0.0) -> nn.Module:
    """The untrained digits model: 8 blocks, width 96, 3 heads, 12 x 12 patches, 10 classes.

    Args:
        patch_drop_rate: share of the patches that are left out at random while training.
    """
    cfg: dict[str, Any] = {
        "architecture": NAME, "tag": "", "input_size": (3, CANVAS, CANVAS), "num_classes": 10,
        "mean": (MEAN,) * 3, "std": (STD,) * 3, "crop_pct": 1.0, "url": "", "hf_hub_id": None,
    }  # fmt: skip
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=CANVAS, num_classes=10, patch_drop_rate=patch_drop_rate,
        pretrained_cfg_overlay=cfg, **SHAPE,
    )  # fmt: skip


def load(path: str | Path | None = None) -> nn.Module:
    """The trained digits model in evaluation mode, float32.

    Args:
        path: weights written by `python -m slimvit.demo.train`; the shipped ones if None.
    """
    model = build()
    with as_file(files("slimvit.demo") / WEIGHTS) as shipped:
        load_checkpoint(model, path or shipped)
    return model.eval()


def facts(path: str | Path | None = None) -> dict[str, object]:
    """What the training script wrote beside the weights: held-out top-1 in percent, settings."""
    with (
        as_file(files("slimvit.demo") / WEIGHTS) as shipped,
        safe_open(path or shipped, "pt") as file,
    ):
        strings = file.metadata()
    return {key: json.loads(value) for key, value in strings.items() if key != "format"}


def save(model: nn.Module, path: str | Path, **metadata: object) -> None:
    """Write the weights as float16 safetensors, the metadata as JSON strings."""
    state = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    strings = {key: json.dumps(value) for key, value in metadata.items()}
    atomic_write(path, tensor_bytes(state, {"format": "pt", **strings}))
