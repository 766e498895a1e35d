"""What norms and activations are called, and which modules do no more than their class says."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

_Tokens = TypeVar("_Tokens")
# By the class whose forward is called: a subclass may have one of its own. timm is for
# slimvit.models.
_LAYER_NORMS = {
    ("torch.nn.modules.normalization", "LayerNorm"),
    ("timm.layers.norm", "LayerNorm"),
    ("timm.layers.norm", "LayerNormFp32"),
}
_ACTIVATIONS = {
    ("timm.layers.activations", "GELU"): "gelu",
    ("timm.layers.activations", "GELUTanh"): "gelu_tanh",
    ("timm.layers.activations", "QuickGELU"): "quick_gelu",
}
_DROPOUTS = {
    ("torch.nn.modules.linear", "Identity"),
    ("torch.nn.modules.dropout", "Dropout"),
    ("timm.layers.drop", "DropPath"),
}


def only_drops(module: nn.Module) -> bool:
    """Whether a module is nothing but dropout or drop path, which inference does without."""
    return _forward_of(module) in _DROPOUTS and altered("dropout", module) is None


def layer_norm_of(norm: nn.Module, hooks: bool = False) -> tuple[Tensor, Tensor, float] | None:
    """Weight, bias and eps of a LayerNorm, or None if a call of it computes anything else.

    Args:
        norm: any module.
        hooks: take one with hooks, too: whoever asks calls it.
    """
    if not isinstance(norm, nn.LayerNorm) or not norm.elementwise_affine:
        return None
    if _forward_of(norm) not in _LAYER_NORMS or altered("norm", norm, hooks=not hooks) is not None:
        return None
    bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
    return norm.weight, bias, norm.eps


def activation_name(module: nn.Module, hooks: bool = False) -> str | None:
    """What the kernels call an activation, or None if they have none such.

    Args:
        module: any module.
        hooks: take one with hooks, too: whoever asks calls it.
    """
    if altered("activation", module, hooks=not hooks) is not None:
        return None
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _ACTIVATIONS.get(_forward_of(module))


def altered(name: str, module: nn.Module, deep: bool = True, hooks: bool = True) -> str | None:
    """What makes calls of a module differ from what its class computes, or None.

    Args:
        name: what the module is called in the answer, its parts after it.
        module: with hooks, or a `forward` set on the module itself.
        deep: whether its parts count too.
        hooks: whether hooks count.
    """
    for path, part in module.named_modules() if deep else [("", module)]:
        where = f"{name}.{path}" if path else name
        if hooks and (part._forward_hooks or part._forward_pre_hooks):
            return f"{where} has forward hooks"
        if "forward" in vars(part):
            return f"{where} has a forward set on it"
    return None


def call_as(module: nn.Module, forward: Callable[[_Tokens], _Tokens], x: _Tokens) -> _Tokens:
    """`forward(x)` in the place of what a module computes, and the module's hooks around it."""
    if not (module._forward_hooks or module._forward_pre_hooks):
        return forward(x)
    # Not copy.copy: classes that torch.distributed makes of a module's cannot be made anew.
    twin = object.__new__(type(module))
    vars(twin).update(vars(module), forward=forward)
    return twin(x)


def _forward_of(module: nn.Module) -> tuple[str, str]:
    """Where the forward that is called was written, and the class that has it."""
    # Not its __qualname__: torch.compile of torch 2.10 tells another one.
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return type(module).forward.__module__, owner.__qualname__
