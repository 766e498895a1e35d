"""The masks file: safetensors, bool [L, N] with optional scores and errors, string metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from slimvit.errors import MasksError
from slimvit.files import atomic_write, tensor_bytes
from slimvit.masks._masks import Masks

FORMAT = "slimvit-masks"
PLAN_FORMAT = "slimvit-plan"
VERSION = 1


def save(masks: Masks, path: str | os.PathLike[str]) -> None:
    tensors = {name: getattr(masks, name) for name in ("keep", "scores", "errors")}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "model": masks.model,
        "grid": json.dumps(list(masks.grid)),
        "prefix": str(masks.prefix),
        "semantics": masks.semantics,
        "data": masks.data,
    }
    if masks.image_size is not None:
        metadata["image_size"] = json.dumps(list(masks.image_size))
    if masks.tolerance is not None:
        metadata["tolerance"] = repr(float(masks.tolerance))
    atomic_write(path, tensor_bytes(tensors, metadata))


def load(path: str | os.PathLike[str]) -> Masks:
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "not found"
        raise MasksError(f"masks file {what}: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise MasksError(f"{path} is not a readable safetensors file: {error}") from error
    if metadata.get("format") == PLAN_FORMAT:
        raise MasksError(f"{path} must be a masks file, got a dynamic plan's")
    if metadata.get("format") != FORMAT:
        raise MasksError(
            f"{path} is not a masks file: metadata 'format' must be {FORMAT!r}, "
            f"got {metadata.get('format')!r}"
        )
    if metadata.get("version") != str(VERSION):
        raise MasksError(
            f"{path} has masks format version {metadata.get('version')!r}, "
            f"this slimvit reads version {VERSION}"
        )
    if "keep" not in tensors:
        raise MasksError(f"{path} lacks the tensor 'keep'")
    unknown = set(tensors) - {"keep", "scores", "errors"}
    if unknown:
        raise MasksError(f"{path} holds unknown tensors: {', '.join(sorted(unknown))}")
    try:
        return Masks(
            keep=tensors["keep"],
            prefix=int(metadata["prefix"]),
            grid=json.loads(metadata["grid"]),
            semantics=metadata["semantics"],
            model=metadata["model"],
            image_size=json.loads(metadata["image_size"]) if "image_size" in metadata else None,
            tolerance=float(metadata["tolerance"]) if "tolerance" in metadata else None,
            scores=_floats(tensors.get("scores")),
            errors=_floats(tensors.get("errors")),
            data=metadata["data"],
        )
    except KeyError as error:
        raise MasksError(f"{path} lacks the metadata {error}") from error
    except MasksError as error:
        raise MasksError(f"{path}: {error}") from error
    except (ValueError, TypeError) as error:
        raise MasksError(f"{path} has unreadable metadata: {error}") from error


def _floats(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is not None and not tensor.is_floating_point():
        raise MasksError(f"scores and errors must be floating point, got {tensor.dtype}")
    return tensor
