"""The slimmed model for inference: fused where a back end can, same call, same outputs."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable

import torch
from torch import nn

from slimvit import models
from slimvit.backends import choose
from slimvit.backends.forks import guard_forks
from slimvit.dynamic import Planner
from slimvit.errors import UsageError
from slimvit.masks import Masks
from slimvit.ops import why_not_fused, why_not_packed
from slimvit.runtime.accelerated import AcceleratedViT, dtype_name
from slimvit.runtime.apply_masks import apply_masks
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
    masks: Masks | Planner | str | os.PathLike[str],
    *,
    backend: str = "auto",
    precision: str | None = None,
    batch_sizes: Iterable[int] = (),
    cuda_graphs: bool = False,
) -> AcceleratedViT:
    """The slimmed model for inference; the given model is not changed.

    Args:
        model: a timm VisionTransformer; its device is where the result runs.
        masks: kept sets, a dynamic plan, or the path of a file with either.
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
        `num_classes`) that answers like `apply_masks(model, masks).eval()`.

    Raises:
        UnsupportedModelError: the model cannot be slimmed.
        MasksError, PlanError: the masks or the plan are wrong or do not fit the model.
        SlimvitError: the back end or the precision cannot run here; the message says why.
    """
    sizes = _sizes(batch_sizes)
    slim = apply_masks(model, masks)
    token = slim.cls_token
    precision = dtype_name(token.dtype) if precision is None else precision
    if precision not in PRECISIONS and precision == dtype_name(token.dtype):
        raise UsageError(
            f"the model is in {precision}: give a precision, one of {', '.join(PRECISIONS)}"
        )
    if precision not in PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    dtype = PRECISIONS[precision]
    plan = getattr(slim, "plan", None)
    if cuda_graphs and plan is not None and plan.ragged:
        raise UsageError("cuda_graphs needs a plan whose images all keep as many patches")
    if cuda_graphs and (not token.is_cuda or not sizes):
        why = f"the model is on {token.device}" if sizes else "batch_sizes is empty"
        raise UsageError(f"cuda_graphs needs a model on a GPU and batch_sizes: {why}")
    if token.device.type == "cpu":
        guard_forks()
    spec = models.spec(model)
    # Kernels read a dynamic model as one whose masks keep everything in the model's own order.
    folded = slim if plan is None else apply_masks(model, _dense(spec))
    folded.fold()
    parts = folded.network_parts()

    def refuses(name: str) -> str | None:
        if name == "torch":
            return None
        if isinstance(parts, str):
            return parts
        if plan is not None:
            reason = why_not_dynamic(plan, name)
            if reason is not None:
                return reason
        return why_not_packed(parts) if name == "cpu" else why_not_fused(parts, name)

    backend = choose(backend, token.device, dtype, refuses)
    shape = (spec.in_chans, *spec.image_size)
    if backend == "torch":
        fast = AcceleratedViT(slim.to(dtype), backend, shape)
    elif backend == "cpu" and plan is None:
        fast = PackedViT(folded, parts, dtype, shape)
    elif backend == "cpu":
        fast = PackedDynamicViT(folded, plan, choosers_of(plan, "cpu"), parts, dtype, shape)
    elif plan is None:
        fast = FusedViT(folded, parts, dtype, backend, shape)
    else:
        choosers = choosers_of(plan, backend)
        fast = FusedDynamicViT(folded, plan, choosers, parts, dtype, backend, shape)
    fast.eval().requires_grad_(False)
    for size in sizes or ([1] if backend == "triton" and token.is_cuda else []):
        fast.warm_up(size, cuda_graph=cuda_graphs)
    return fast


def _sizes(given: Iterable[int]) -> list[int]:
    try:
        sizes = [operator.index(size) for size in given]
    except TypeError:
        raise UsageError(f"batch_sizes must be whole numbers in a list, got {given!r}") from None
    if any(size < 1 for size in sizes):
        raise UsageError(f"batch_sizes must be positive, got {sizes}")
    return sizes


def why_not_dynamic(plan: Planner, backend: str) -> str | None:
    """Why the kernels of a back end do not choose tokens as a plan does, or None if they do."""
    choosers = choosers_of(plan, backend)
    return choosers if isinstance(choosers, str) else None


def _dense(spec: models.Spec) -> Masks:
    return Masks.dense(spec.depth, spec.grid, spec.prefix)
