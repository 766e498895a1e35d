"""What each GPU kernel computes: its formula in plain PyTorch, in whatever dtype is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def reference(function: str, arguments: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What the kernel that `function` launches answers to these arguments, computed in `dtype`."""
    plain = mapped(arguments, lambda t: t.to(dtype) if t.is_floating_point() else t)
    return tuple(_REFERENCES[function](**plain))


def mapped(arguments: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Arguments with every tensor among them changed, those in tuples too."""

    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            items = [one(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return change(value) if isinstance(value, Tensor) else value

    return {name: one(value) for name, value in arguments.items()}


def _norm(x: Tensor, eps: float, spread: Tensor | None = None) -> Tensor:
    if spread is None:
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    return (x - x.mean(-1, keepdim=True)) * _rstd(x, eps, spread)


def _rstd(x: Tensor, eps: float, spread: Tensor) -> Tensor:
    return (x.var(-1, correction=0, keepdim=True) + spread[..., None] + eps).rsqrt()


def _taken(x: Tensor, index: Tensor | None, n: int) -> Tensor:
    if index is None:
        return x[:, :n]
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _activate(x: Tensor, name: str) -> Tensor:
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if name == "none":
        return x
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def _mean_activation(u: Tensor, s: Tensor, name: str) -> Tensor:
    """Of values about u whose variance is s."""
    if name == "none":
        return u
    r = (1 + s).rsqrt()
    z = u * r
    density = torch.exp(-0.5 * z.square()) * (2 * math.pi) ** -0.5
    return (_activate(z, name) + (1 - r.square()) * density) / r


def _embedding(images, weight, table, order, prefix, **_) -> list[Tensor]:
    patches = F.conv2d(images, weight, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    tokens = F.pad(patches, (0, 0, prefix, 0))
    return [tokens[:, order] + table]


def _qkv(x, weight, bias, n, inner, eps, index, **_) -> list[Tensor]:
    y = _norm(x, eps)
    kv = F.linear(y, weight[inner:], bias[inner:])
    return [F.linear(_taken(y, index, n), weight[:inner], bias[:inner]), kv]


def _linear(
    x, weight, bias, n, groups, stats, eps, activation, residual, index, spread, squares, **_
) -> list[Tensor]:
    n = x.shape[1] if n is None else n
    rows = index if residual is None else None
    x = _taken(x, rows, n)
    spread = None if spread is None else _taken(spread[..., None], rows, n)[..., 0]
    y = x if stats is None else _norm(x, eps, spread)
    y = y.unflatten(2, (groups, -1)).transpose(1, 2)  # [B, groups, n, K]
    y = y @ weight.unflatten(0, (groups, -1)).transpose(1, 2)
    y = y.transpose(1, 2).flatten(2)
    y = y if bias is None else y + bias
    if spread is None:
        y = _activate(y, activation)
    else:
        s = spread[..., None] * _rstd(x, eps, spread).square() * squares
        y = _mean_activation(y, s, activation)
    return [y if residual is None else y + _taken(residual, index, n)]


def _attention(q, kv, heads, key_bias, extra, **_) -> list[Tensor]:
    if key_bias is not None or extra is not None:
        raise NotImplementedError("biased keys and zero rows are not measured")
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, *kv.chunk(2, dim=2)))
    return [F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)]


def _last_attention(x, u, head_dim, eps, key_bias, zero_bias, **_) -> list[Tensor]:
    if key_bias is not None or zero_bias is not None:
        raise NotImplementedError("biased keys and zero rows are not measured")
    y = _norm(x, eps)
    return [(u @ y.transpose(1, 2) * head_dim**-0.5).softmax(-1) @ y]


def _mlp(attended, x, proj, fc1, fc2, eps, activation, index, spread, squares, **_) -> list[Tensor]:
    y = _taken(x, index, attended.shape[1]) + F.linear(attended, *proj)
    u = F.linear(_norm(y, eps, spread), *fc1)
    if spread is None:
        return [y + F.linear(_activate(u, activation), *fc2)]
    s = spread[..., None] * _rstd(y, eps, spread).square() * squares
    return [y + F.linear(_mean_activation(u, s, activation), *fc2)]


def _block(x, part, n, heads, activation, eps, key_bias, zero_rows, index, out) -> list[Tensor]:
    if key_bias is not None or zero_rows or out is not None:
        raise NotImplementedError("biased keys, zero rows and idle tokens are not measured")
    q, kv = _qkv(x, part.qkv, part.qkv_bias, n, part.proj.shape[1], eps[0], index)
    (attended,) = _attention(q, kv, heads, None, None)
    weights = part[3:5], part[5:7], part[8:10]
    return _mlp(attended, x, *weights, eps[1], activation, index, None, None)


def _scatter(x, index, length) -> list[Tensor]:
    index = index.expand(x.shape[0], -1)[..., None].expand_as(x)
    return [x.new_zeros(x.shape[0], length, x.shape[2]).scatter(1, index, x)]


_REFERENCES: dict[str, Callable[..., list[Tensor]]] = {
    "patch_embedding": _embedding,
    "slim_qkv": _qkv,
    "slim_linear": _linear,
    "slim_attention": _attention,
    "last_attention": _last_attention,
    "slim_mlp": _mlp,
    "whole_block": _block,
    "scatter_tokens": _scatter,
}
