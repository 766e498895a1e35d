"""What norms and activations are called, whatever classes a foreign model makes them of."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def layer_norm_of(norm: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """Weight, bias and eps of a LayerNorm, or None if it is no LayerNorm with weights."""
    if not isinstance(norm, nn.LayerNorm) or not norm.elementwise_affine:
        return None
    bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
    return norm.weight, bias, norm.eps


def activation_name(module: nn.Module) -> str | None:
    """What the kernels call an activation, or None if they have none such."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}.get(
        type(module).__name__
    )
