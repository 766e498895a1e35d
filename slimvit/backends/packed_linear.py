"""Linear layers for inference: on CPUs, oneDNN with the weight packed once and the epilogue fused.

torch's own linear packs a bfloat16 weight anew at every call, which costs the same for one token as
for a thousand and so eats what pruning saves at small batches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

_DTYPES = (torch.float32, torch.bfloat16)


def packable(x: Tensor) -> bool:
    """Whether a call on `x` may use packed weights: on a CPU, not traced, no gradient wanted."""
    return (
        x.device.type == "cpu"
        and x.dtype in _DTYPES
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not isinstance(x, FakeTensor)
        and forward_ad._current_level < 0
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and not torch.is_autocast_enabled("cpu")
    )


class PackedLinear(nn.Module):
    """x Wᵀ + b, then GELU or plus a residual, for inference.

    Args:
        weight: [out, in]; not trained.
        bias: [out] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        self._packs: dict[tuple[int | None, int | None], tuple[Any, ...]] = {}

    def forward(
        self,
        x: Tensor,
        rows: slice = slice(None),
        *,
        packed: bool = False,
        gelu: bool = False,
        add: Tensor | None = None,
    ) -> Tensor:
        """The outputs `rows` of the layer.

        Args:
            x: [..., in].
            rows: which outputs to compute.
            packed: what `packable` said of this call.
            gelu: apply the exact GELU, 0.5 x (1 + erf(x / sqrt(2))).
            add: added to the result, of its shape; not together with `gelu`.
        """
        if packed and _holds_still(self.weight) and _holds_still(self.bias):
            weight, bias = self._pack(rows, x)
            if add is not None:
                return torch.ops.mkldnn._linear_pointwise.binary(x, add, weight, bias, "add")
            if gelu:
                return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        whole = rows == slice(None)
        weight = self.weight if whole else self.weight[rows]
        bias = self.bias if whole or self.bias is None else self.bias[rows]
        y = F.linear(x, weight, bias)
        if add is not None:
            return add + y
        return F.gelu(y) if gelu else y

    def _pack(self, rows: slice, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The packed weight and the bias of some outputs; packed anew if either has changed.

        What is written through `.data`, or by NumPy, has no version and is not noticed.
        """
        weight, bias = self.weight, self.bias
        state = _state(weight) if bias is None else _state(weight) + _state(bias)
        pack = self._packs.get((rows.start, rows.stop))
        if pack is None or pack[0] != state:
            part = weight.detach()[rows].contiguous()
            packed = torch.ops.mkldnn._reorder_linear_weight(part, x.numel() // x.shape[-1])
            own = None if bias is None else bias.detach()
            # Held, the memory of what was packed is not given to another tensor.
            held = (weight.detach(), own)
            pack = (state, packed, None if own is None else own[rows].contiguous(), held)
            self._packs[(rows.start, rows.stop)] = pack
        return pack[1], pack[2]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packs": {}}


def _holds_still(tensor: Tensor | None) -> bool:
    """Whether what is written to a weight can be noticed.

    Fused optimizers count no version of what they train, nor does inference mode of its tensors,
    and those of torch.func have no memory of their own.
    """
    return tensor is None or not (
        tensor.requires_grad
        or tensor.is_inference()
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """What differs when a tensor is written to or another takes its place."""
    return tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype


class PatchLinear(nn.Module):
    """A patch embedding, stride = kernel, as a convolution or as the GEMM that it is.

    Args:
        convolution: whose weights it takes.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.in_channels = convolution.in_channels
        self.patch: tuple[int, int] = tuple(convolution.kernel_size)
        self.linear = PackedLinear(convolution.weight.flatten(1), convolution.bias)

    @staticmethod
    def replaces(module: nn.Module) -> bool:
        """Whether a module is a convolution of patches that neither overlap nor leave a gap."""
        return (
            type(module) is nn.Conv2d
            and not (module._forward_hooks or module._forward_pre_hooks)
            and "forward" not in vars(module)
            and module.stride == module.kernel_size
            and module.padding == (0, 0)
            and module.dilation == (1, 1)
            and module.groups == 1
        )

    def forward(self, images: Tensor) -> Tensor:
        """What the convolution gives, [B, D, gh, gw], for images [B, C, H, W]."""
        batch, channels, height, width = images.shape
        rows, columns = height // self.patch[0], width // self.patch[1]
        images = images[
            ..., : rows * self.patch[0], : columns * self.patch[1]
        ]  # as it drops the rest
        patches = images.reshape(batch, channels, rows, self.patch[0], columns, self.patch[1])
        width = channels * self.patch[0] * self.patch[1]
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, width)
        out = self.linear(patches, packed=packable(patches))
        return out.transpose(1, 2).unflatten(2, (rows, columns))
