"""A timm model by name, with weights from a file or from the hub."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import timm
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from slimvit.checks import whole
from slimvit.errors import CheckpointError, UsageError


def create(
    name: str,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    pretrained: bool = False,
    img_size: int | None = None,
    num_classes: int | None = None,
) -> nn.Module:
    """A timm model in evaluation mode.

    Args:
        name: timm's model name.
        checkpoint: state dict in timm's names (safetensors, or a torch file of tensors); every
            key and shape must fit, a position embedding of another grid is resampled.
        pretrained: take timm's weights from the hub.
        img_size: image side in pixels, if not the model's own.
        num_classes: outputs of the head, if not the model's own.

    Raises:
        UsageError: the model is unknown.
        CheckpointError: the weights are missing, unreadable or do not fit.
    """
    _check_name(name)
    if img_size is not None:
        img_size = whole("img_size", img_size, 1)
    options: dict[str, Any] = {"img_size": img_size, "num_classes": num_classes}
    options = {key: value for key, value in options.items() if value is not None}
    try:
        model = timm.create_model(name, pretrained=pretrained, **options)
    except (TypeError, ValueError, AssertionError) as error:
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        raise UsageError(f"model {name} does not take {given}: {_first_line(error)}") from error
    except Exception as error:  # the hub's client has errors of its own
        if not pretrained:
            raise
        raise CheckpointError(
            f"no pretrained weights for {name} from the hub: {_first_line(error)}"
        ) from error
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model.eval()


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a state dict in timm's names; the model is untouched unless everything fits.

    Raises:
        CheckpointError: the file is missing or unreadable, or a key or a shape does not fit.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"checkpoint not found: {path}")
    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a readable checkpoint: {_first_line(error)}"
        ) from error
    if isinstance(model, VisionTransformer):
        state = _in_timms_names(model, state)
    wanted = model.state_dict()
    missing, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    if missing or extra:
        kinds = {"missing": missing, "extra": extra}
        faults = ", ".join(_some(word, keys) for word, keys in kinds.items() if keys)
        raise CheckpointError(f"{path} does not fit the model: {faults}")
    for key, value in wanted.items():
        shape = getattr(state[key], "shape", None)
        if shape != value.shape:
            got = type(state[key]).__name__ if shape is None else list(shape)
            raise CheckpointError(f"{path}: {key} must be {list(value.shape)}, got {got}")
    model.load_state_dict(state)


def _check_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise UsageError(f"unknown model {name!r}: timm.list_models() has the names{hint}")
    if tag and not timm.is_model_pretrained(name):
        tags = timm.list_pretrained(architecture)
        raise UsageError(f"unknown weights {tag!r} of {architecture}: timm has {', '.join(tags)}")


def _in_timms_names(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        return checkpoint_filter_fn(state, model)
    except Exception:  # it trusts the shapes that it resamples; our own checks name what is wrong
        return state


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _some(word: str, keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    noun = "key" if len(keys) == 1 else "keys"
    return f"{len(keys)} {word} {noun} ({', '.join(keys[:3])}{more})"
