"""Files of a fine-tuning run: the weights in timm's names, and what it takes to go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from slimvit.errors import CheckpointError
from slimvit.files import atomic_write, tensor_bytes

FORMAT = "slimvit-finetune"


def resume_path(output: str | Path) -> Path:
    """The file beside `output` that an unfinished run goes on from."""
    output = Path(output)
    return output.with_name(f"{output.stem}.resume.safetensors")


def plan_path(output: str | Path) -> Path:
    """The file beside `output` that holds the dynamic plan which belongs to its weights."""
    output = Path(output)
    return output.with_name(f"{output.stem}.plan.safetensors")


def save_weights(output: str | Path, model: nn.Module, info: dict[str, Any]) -> None:
    """Write a state dict in timm's names, float32 or whatever the model has, and a plan beside it.

    What is a dynamic plan's is in the plan's own file, `<stem>.plan.safetensors`.

    Raises:
        PlanError: the plan has no kind to be saved under.
        OSError: the folder is missing or not writable, or the disk is full.
    """
    plan = getattr(model, "plan", None)
    if plan is not None:
        plan.save(plan_path(output))
    metadata = {"format": "pt", "slimvit": json.dumps(info, default=str)}
    atomic_write(output, tensor_bytes(_copy(timm_weights(model)), metadata))


def timm_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict in timm's names: all but what is a dynamic plan's."""
    return {k: v for k, v in model.state_dict().items() if not k.startswith("plan.")}


def save_resume(
    path: Path,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    notes: dict[str, Any],
) -> None:
    """Write the modules, the optimizer's moments and `notes` (plain values)."""
    tensors = {
        f"{name}/{key}": value
        for name, module in modules.items()
        for key, value in _copy(module.state_dict()).items()
    }
    for index, moments in optimizer.state_dict()["state"].items():
        for key, value in moments.items():
            tensors[f"optimizer/{index}/{key}"] = torch.as_tensor(value).detach().cpu().clone()
    atomic_write(path, tensor_bytes(tensors, {"format": FORMAT, "notes": json.dumps(notes)}))


def load_resume(
    path: Path,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    identity: dict[str, str],
) -> dict[str, Any]:
    """Put everything back and return the notes.

    Raises:
        CheckpointError: not a file of such a run, damaged, or of a run with other settings,
            weights or data.
    """
    advice = "delete it, or start over with --restart"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not the file of an unfinished run: {advice}")
        notes = json.loads(metadata["notes"])
        theirs = notes["identity"]
        keys = dict.fromkeys((*identity, *theirs))
        if other := [key for key in keys if identity.get(key) != theirs.get(key)]:
            raise CheckpointError(f"{path} is of a run with other {', '.join(other)}: {advice}")
        for name, module in modules.items():
            module.load_state_dict(_under(tensors, name))
        _load_optimizer(optimizer, _under(tensors, "optimizer"))
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read ({error}): {advice}") from error
    return notes


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}


def _under(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    start = f"{name}/"
    return {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
