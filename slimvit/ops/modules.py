"""What norms and activations are called, and which modules do no more than their class says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
    return forward_of(module) in _DROPOUTS and altered("dropout", module) is None


def layer_norm_of(norm: nn.Module, hooks: bool = False) -> tuple[Tensor, Tensor, float] | None:
    """Weight, bias and eps of a LayerNorm, or None if a call of it computes anything else.

    Args:
        norm: any module.
        hooks: take one with hooks, too: whoever asks calls it.
    """
    if not isinstance(norm, nn.LayerNorm) or not norm.elementwise_affine:
        return None
    if forward_of(norm) not in _LAYER_NORMS or altered("norm", norm, hooks=not hooks) is not None:
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
    return _ACTIVATIONS.get(forward_of(module))


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
        if hooks and (part._backward_hooks or part._backward_pre_hooks):
            return f"{where} has backward hooks"
        if "forward" in vars(part):
            return f"{where} has a forward set on it"
    return None


class Through:
    """Mixed into a module's class by `through`: calls compute something else in its place.

    So hooks, wrappers and what else hangs on calls of the module work as ever.
    """

    def forward(self, *args: Any, compute: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        """`compute` of the module and what it is given, or what the class computes."""
        if compute is None:
            return super().forward(*args, **kwargs)
        return compute(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _rebuild, (without_through(type(self)),), self.__getstate__()


def through(module: nn.Module) -> None:
    """Let a module be called for what something else computes, by `module(x, compute=…)`."""
    if not isinstance(module, Through):
        module.__class__ = _through(type(module))


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that torch's checkpoint_wrapper or compile wraps, or the module itself."""
    for name in ("_checkpoint_wrapped_module", "_orig_mod"):
        module = getattr(module, name, module)
    return module


def call_through(
    module: nn.Module, compute: Callable[[nn.Module, Tensor], Tensor], x: Tensor
) -> Tensor:
    """`compute` of a module and x in the place of what the module computes, hooks around it.

    Args:
        module: any module without a forward set on it, or what torch wraps around one.
        compute: called with the module itself, once its hooks have run.
        x: what the module is called with.
    """
    inner = unwrapped(module)
    called = inner is not module or altered("module", module, deep=False) is not None
    if not called and not isinstance(module, Through):
        return compute(module, x)
    through(inner)
    return module(x, compute=compute)


def without_through(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that `through` was mixed into."""
    return cls.__mro__[cls.__mro__.index(Through) + 1] if issubclass(cls, Through) else cls


@functools.cache
def _through(base: type[nn.Module]) -> type[nn.Module]:
    return type(base.__name__, (Through, base), {"__module__": __name__})


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = _through(base)
    return cls.__new__(cls)


def forward_of(module: nn.Module) -> tuple[str, str]:
    """Where the forward that is called was written, and the class that has it."""
    # Not its __qualname__: torch.compile of torch 2.10 tells another one.
    classes = without_through(type(module)).__mro__
    owner = next(cls for cls in classes if "forward" in vars(cls))
    return owner.forward.__module__, owner.__qualname__
