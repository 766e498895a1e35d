"""The plan file: safetensors, the planner's weights as tensors, its settings as metadata."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from slimvit.dynamic.planner import Planner
from slimvit.errors import MasksError, PlanError
from slimvit.files import atomic_write
from slimvit.masks import Masks
from slimvit.models import Spec

FORMAT = "slimvit-plan"
VERSION = 1


def save(plan: Planner, path: str | os.PathLike[str]) -> None:
    """Write a plan, whole or not at all."""
    if not plan.kind:
        raise PlanError(f"{type(plan).__name__} has no kind: a plan without a name is not saved")
    tensors = {name: tensor.detach().cpu() for name, tensor in plan.state_dict().items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "kind": plan.kind,
        "settings": json.dumps(plan.settings()),
    }
    if plan.spec is not None:
        metadata["spec"] = json.dumps(dataclasses.asdict(plan.spec))
        metadata["counts"] = json.dumps(plan.counts)
    atomic_write(path, to_bytes({k: t.contiguous() for k, t in tensors.items()}, metadata))


def load_plan(path: str | os.PathLike[str]) -> Planner | Masks:
    """Read and validate a plan file, or a masks file.

    Raises:
        PlanError: the file is missing, truncated, not a plan, of an unknown kind or another
            version, or its settings or weights do not fit each other.
        MasksError: it is a masks file and wrong.
    """
    if not Path(path).is_file():
        raise PlanError(f"plan file not found: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PlanError(f"{path} is not a readable safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        try:
            return Masks.load(path)
        except MasksError as error:
            raise MasksError(f"{path} is no plan file either: {error}") from error
    if metadata.get("version") != str(VERSION):
        raise PlanError(
            f"{path} has plan format version {metadata.get('version')!r}, "
            f"this slimvit reads version {VERSION}"
        )
    plan = _make(path, metadata)
    try:
        plan.load_state_dict(tensors)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise PlanError(f"{path}: weights do not fit: {' '.join(lines[1:])}") from error
    return plan.eval()


def _make(path: str | os.PathLike[str], metadata: dict[str, str]) -> Planner:
    kind = metadata.get("kind", "")
    if kind not in Planner.kinds:
        known = ", ".join(sorted(Planner.kinds))
        raise PlanError(f"{path} has the planner {kind!r}, known are {known}")
    try:
        plan = Planner.kinds[kind](**json.loads(metadata["settings"]))
        if "spec" in metadata:
            plan.counts = tuple(json.loads(metadata["counts"]))
            plan = plan.bind(_spec(json.loads(metadata["spec"])))
    except KeyError as error:
        raise PlanError(f"{path} lacks the metadata {error}") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    except (ValueError, TypeError) as error:
        raise PlanError(f"{path} has unreadable metadata: {error}") from error
    return plan


def _spec(fields: dict[str, Any]) -> Spec:
    pairs = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return Spec(**pairs)
