"""The plan file: safetensors, the planner's weights as tensors, its settings as metadata."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from slimvit.dynamic.planner import Planner, check_begun
from slimvit.errors import PlanError
from slimvit.files import atomic_write, tensor_bytes
from slimvit.masks import Masks
from slimvit.masks._file import FORMAT as MASKS_FORMAT
from slimvit.masks._file import PLAN_FORMAT as FORMAT
from slimvit.models import Spec

_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
VERSION = 1
_RENAMED = {"static": "static-plan"}


def save(plan: Planner, path: str | os.PathLike[str]) -> None:
    """Write a plan, whole or not at all.

    Raises:
        PlanError: it could not be read again; see `check_savable`.
        OSError: the folder is missing or not writable, or the disk is full.
    """
    check_savable(plan)
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
    atomic_write(path, tensor_bytes({k: t.contiguous() for k, t in tensors.items()}, metadata))


def check_savable(plan: Planner) -> None:
    """Refuse a plan that a file would not bring back as it is.

    Raises:
        PlanError: it has no kind of its own, tensors that are neither buffers nor parameters, or
            arguments that its `settings` do not name.
    """
    check_begun(plan)
    name = type(plan).__name__
    if not plan.kind:
        raise PlanError(f"{name} has no kind: a plan without a name is not saved")
    read, kind = Planner.kinds.get(plan.kind), type(plan)
    # The same class again, from a notebook's cell or a reloaded module, reads its plans.
    if read is None or (read.__module__, read.__qualname__) != (kind.__module__, kind.__qualname__):
        raise PlanError(
            f"{name} must have a kind of its own, or a file would bring back another plan: "
            f"{plan.kind!r} is {'of no class' if read is None else read.__name__}"
        )
    settings = plan.settings()
    for attribute, value in vars(plan).items():
        if isinstance(value, Tensor) and attribute not in settings:
            raise PlanError(
                f"{name}.{attribute} is a tensor that a file would lose: make it a buffer by "
                f"register_buffer({attribute!r}, …), or a parameter"
            )
    classes = type(plan).__mro__
    made, told = (
        next(place for place, cls in enumerate(classes) if method in vars(cls))
        for method in ("__init__", "settings")
    )
    if made >= told:  # whoever wrote the settings knew the arguments
        return
    parameters = list(inspect.signature(classes[made].__init__).parameters.values())[1:]
    lost = [p.name for p in parameters if p.kind not in _REST and p.name not in settings]
    if lost:
        raise PlanError(
            f"{name}.settings must name every argument of {name}, or a file would bring back "
            f"another plan; {', '.join(lost)} is missing"
        )


def load_plan(path: str | os.PathLike[str]) -> Planner | Masks:
    """Read and validate a plan file, or a masks file.

    Raises:
        PlanError: the file is missing, truncated, not a plan, of an unknown kind or another
            version, or its settings or weights do not fit each other.
        MasksError: it is a masks file and wrong.
    """
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "not found"
        raise PlanError(f"masks or plan file {what}: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PlanError(f"{path} is not a readable safetensors file: {error}") from error
    found = metadata.get("format")
    if found == MASKS_FORMAT:
        return Masks.load(path)
    if found != FORMAT:
        raise PlanError(
            f"{path} is neither a masks file nor a plan file: metadata 'format' must be "
            f"{MASKS_FORMAT!r} or {FORMAT!r}, got {found!r}"
        )
    if metadata.get("version") != str(VERSION):
        raise PlanError(
            f"{path} has plan format version {metadata.get('version')!r}, "
            f"this slimvit reads version {VERSION}"
        )
    try:
        plan = _make(metadata)
        _fill(plan, tensors)
        if plan.spec is not None:
            counts, plan = plan.counts, plan.bind(plan.spec)  # checks what the weights brought
            if plan.counts != counts:
                raise PlanError(f"it keeps {list(plan.counts)}, but names {list(counts)}")
    except KeyError as error:
        raise PlanError(f"{path} lacks the metadata {error}") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    except (ValueError, TypeError, RuntimeError) as error:
        first = next(iter(str(error).splitlines()), repr(error))
        raise PlanError(f"{path} has unreadable metadata: {first}") from error
    return plan.eval()


def _make(metadata: dict[str, str]) -> Planner:
    """The planner without its weights."""
    kind = _RENAMED.get(metadata.get("kind", ""), metadata.get("kind", ""))
    if kind not in Planner.kinds:
        known = ", ".join(sorted(Planner.kinds))
        raise PlanError(
            f"the planner {kind!r} is unknown, known are {known}: one of your own is known once "
            "the module that defines it is imported (commands take --import FILE.py)"
        )
    plan = Planner.kinds[kind](**json.loads(metadata["settings"]))
    if "spec" in metadata:
        plan.counts = tuple(json.loads(metadata["counts"]))
        plan = plan.bind(_spec(json.loads(metadata["spec"])))
        plan.counts = tuple(json.loads(metadata["counts"]))
    return plan


def _fill(plan: Planner, tensors: dict[str, Tensor]) -> None:
    """Put the file's tensors into the planner."""
    for name, own in plan.state_dict().items():
        given = tensors.get(name)
        if given is not None and given.is_floating_point() != own.is_floating_point():
            raise PlanError(f"{name} must be {own.dtype}, got {given.dtype}")
        if given is not None and not given.isfinite().all():
            raise PlanError(f"{name} must be finite, got NaN or infinity")
    try:
        plan.load_state_dict(tensors)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise PlanError(f"weights do not fit: {' '.join(lines[1:])}") from error


def _spec(values: Any) -> Spec:
    if not isinstance(values, dict):
        raise ValueError(f"spec must be an object, got {values!r}")
    pairs = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    spec = Spec(**pairs)
    for field in dataclasses.fields(Spec):
        value = getattr(spec, field.name)
        if not _fits(value, str(field.type)):
            raise ValueError(f"spec's {field.name} must be {field.type}, got {value!r}")
    return spec


def _fits(value: object, kind: str) -> bool:
    if kind.startswith("tuple"):
        return isinstance(value, tuple) and len(value) == 2 and all(_fits(v, "int") for v in value)
    if kind == "int":
        return type(value) is int and value >= 0
    return type(value).__name__ == kind
