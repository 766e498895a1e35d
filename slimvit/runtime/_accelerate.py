"""The slimmed model for inference: fused where a back end can, same call, same outputs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from slimvit import models
from slimvit.backends import choose
from slimvit.backends.forks import guard_forks
from slimvit.backends.fused_checks import tf32_allowed
from slimvit.checks import dtype_name, one_of, wholes
from slimvit.dynamic import Planner
from slimvit.errors import UsageError
from slimvit.masks import Masks
from slimvit.models import SlimmedViT
from slimvit.ops import (
    DynamicNetwork,
    FusedDynamicNetwork,
    FusedNetwork,
    NetworkParts,
    PackedNetwork,
    why_not_fused,
    why_not_packed,
)
from slimvit.ops.modules import altered
from slimvit.runtime._apply_masks import apply_masks
from slimvit.runtime.accelerated import AcceleratedViT, check_graph
from slimvit.runtime.choosers import choosers_of
from slimvit.runtime.fused import FusedViT
from slimvit.runtime.fused_dynamic import FusedDynamicViT
from slimvit.runtime.packed import PackedViT
from slimvit.runtime.packed_dynamic import PackedDynamicViT

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@torch.inference_mode(False)  # within it, changes of the weights could not be noticed
def accelerate(
    model: nn.Module,
    masks: Masks | Planner | str | os.PathLike[str] | None = None,
    *,
    backend: str = "auto",
    precision: str | None = None,
    batch_sizes: Iterable[int] = (),
    cuda_graphs: bool = False,
) -> AcceleratedViT:
    """The slimmed model for inference; the given model is not changed.

    Args:
        model: a timm VisionTransformer, or what `apply_masks` made of one; its device is where the
            result runs.
        masks: kept sets, a dynamic plan, or the path of a file with either; None for those of a
            slimmed model.
        backend: "torch", "cpu", "triton", "cuda", or "auto" for the fastest that works here.
        precision: "float32", "bfloat16" or "float16"; None keeps the model's own. In
            float32 the products of the Triton kernels are in TF32 where
            `torch.set_float32_matmul_precision` allows it.
        batch_sizes: sizes that calls will have: whatever they need is compiled now rather than at
            the first call. Triton's kernels are always compiled for one image.
        cuda_graphs: hold a CUDA graph for each of `batch_sizes`, which frees small batches from the
            cost of launching kernels. Calls of another size, or compiled ones, go without.

    Returns:
        A module with timm's calls (`forward`, `forward_features`, `forward_head`,
        `get_classifier`, `num_classes`, `num_features`) that answers like
        `apply_masks(model, masks).eval()`.

    Raises:
        UsageError: `masks` are nothing of these, None with a dense model, or an option is unknown.
        UnsupportedModelError: the model cannot be slimmed.
        MasksError, PlanError: the masks or the plan are wrong or do not fit the model.
        SlimvitError: the back end or the precision cannot run here; the message says why.
    """
    sizes = wholes("batch_sizes", batch_sizes, 1)
    if masks is None:
        model, masks = _apart(model)
    slim = apply_masks(model, masks)
    plan, device = getattr(slim, "plan", None), slim.cls_token.device
    dtype = _dtype(precision, slim.cls_token.dtype)
    if cuda_graphs:
        if not sizes:
            raise UsageError("cuda_graphs needs batch_sizes, a graph for each: they are empty")
        check_graph(plan, device)
    if device.type == "cpu":
        guard_forks()
    spec = models.spec(model)
    # Kernels read a dynamic model as one whose masks keep everything in the model's own order.
    folded = slim if plan is None else apply_masks(model, _dense(spec))
    if torch.finfo(folded.cls_token.dtype).bits < 16:  # which nothing computes in
        folded.to(dtype)
    folded.fold()
    parts = folded.network_parts()
    backend = choose(backend, device, dtype, partial(_why_not, parts, plan))
    shape = (spec.in_chans, *spec.image_size)
    if backend == "torch":
        fast = AcceleratedViT(slim.to(dtype), backend, shape)
    else:
        fast = _compiled(folded, plan, parts, dtype, backend, shape)
    fast.eval().requires_grad_(False)
    for size in sizes or ([1] if backend == "triton" and device.type == "cuda" else []):
        fast.warm_up(size, cuda_graph=cuda_graphs)
    return fast


def _apart(slim: nn.Module) -> tuple[nn.Module, Masks | Planner]:
    """A slimmed model's dense model and its masks or plan."""
    if not isinstance(slim, SlimmedViT):
        raise UsageError(f"masks must be given with a dense model, got {type(slim).__name__} alone")
    return slim.dense(), slim.kept


def _compiled(
    folded: nn.Module,
    plan: Planner | None,
    parts: NetworkParts,
    dtype: torch.dtype,
    backend: str,
    shape: tuple[int, int, int],
) -> AcceleratedViT:
    """The model in a back end's kernels."""
    choosers = None if plan is None else choosers_of(plan, backend)
    if backend == "cpu":
        if plan is None:
            return PackedViT(folded, PackedNetwork(parts, dtype), shape)
        packed = DynamicNetwork(parts._replace(counts=plan.counts), choosers, dtype)
        return PackedDynamicViT(folded, packed, shape, plan)
    how = (dtype, tf32_allowed(), backend)
    if plan is None:
        return FusedViT(folded, FusedNetwork(parts, *how), shape)
    fused = FusedDynamicNetwork(parts, plan.counts, choosers, *how)
    return FusedDynamicViT(folded, fused, shape, plan)


def _dtype(precision: str | None, own: torch.dtype) -> torch.dtype:
    """What to compute in; None keeps the model's own dtype."""
    if precision is None and own not in PRECISIONS.values():
        known = ", ".join(PRECISIONS)
        raise UsageError(f"the model is in {dtype_name(own)}: give a precision, one of {known}")
    return own if precision is None else PRECISIONS[one_of("precision", precision, PRECISIONS)]


def _why_not(parts: NetworkParts | str, plan: Planner | None, backend: str) -> str | None:
    """Why a back end does not run this model and plan, or None if it does."""
    if backend == "torch":
        return None
    if isinstance(parts, str):
        return parts
    if plan is not None:
        reason = altered("the plan", plan)
        if reason is not None:
            return f"{reason}, which would not run"
        reason = why_not_dynamic(plan, backend)
        if reason is not None:
            return reason
    return why_not_packed(parts) if backend == "cpu" else why_not_fused(parts, backend)


def why_not_dynamic(plan: Planner, backend: str) -> str | None:
    """Why the kernels of a back end do not choose tokens as a plan does, or None if they do."""
    choosers = choosers_of(plan, backend)
    return choosers if isinstance(choosers, str) else None


def _dense(spec: models.Spec) -> Masks:
    return Masks.dense(spec.depth, spec.grid, spec.prefix)
