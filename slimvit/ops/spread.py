"""Norm and MLP of tokens that stand for several: the mean of what they make of each of them.

A token that others were averaged into is the mean of its members, and its spread, the mean squared
deviation of the members from it per channel, tells what the mean alone does not: members of unlike
tokens have a longer way to their own norm, and an activation bends between them. Deviations are
taken for as large in every direction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from slimvit.ops.modules import (
    activation_name,
    altered,
    call_through,
    forward_of,
    layer_norm_of,
    unwrapped,
)

_MLP_CLASS = ("timm.layers.mlp", "Mlp")
_MLP = ("fc1", "act", "drop1", "norm", "fc2", "drop2")  # timm's


def variance(x: Tensor) -> Tensor:
    """Of the channels of tokens x [m, B, D]: [B, m], in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.var(-1, unbiased=False).t()


def spread_norm(norm: nn.Module, x: Tensor, spread: Tensor | None) -> Tensor:
    """The mean of the members' norms, to first order in their spread.

        LN(x) = (x − mean) / sqrt(var(x) + spread + eps) · γ + β

    Args:
        norm: a LayerNorm, with its hooks; another norm is applied as it is.
        x: [m, B, D].
        spread: [B, m], or None for none.

    Returns:
        [m, B, D].
    """
    if spread is None or layer_norm_of(unwrapped(norm), hooks=True) is None:
        return norm(x)

    def compute(norm: nn.Module, x: Tensor) -> Tensor:
        weight, bias, eps = layer_norm_of(norm, hooks=True)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (variance(x) + spread + eps).rsqrt().t().unsqueeze(-1)
        y = (wide - wide.mean(-1, keepdim=True)) * scale
        return torch.addcmul(bias.to(y.dtype), y, weight.to(y.dtype)).to(x.dtype)

    return call_through(norm, compute, x)


def spread_mlp(mlp: nn.Module, norm: nn.Module, x: Tensor, spread: Tensor | None) -> Tensor:
    """MLP(norm(x)), the mean of the members', to second order in their spread.

        u = W1 LN(x) + b1,   s_j = spread / (var(x) + spread + eps) · Σ_c (W1_jc γ_c)²
        r = 1 / sqrt(1 + s),   z = u r,   hidden = (act(z) + (1 − r²) φ(z)) / r

    That is the mean of GELU(u + √s ε) over ε ~ N(0, 1), and of the others of its kind as nearly as
    they are GELU; activations of other classes are averaged over three points of the Gaussian.

    Args:
        mlp: two linear layers, whatever their classes, and an activation between them; another MLP
            is applied as it is.
        norm: the norm ahead of it.
        x: [m, B, D].
        spread: [B, m], or None for none.

    Returns:
        [m, B, D].
    """
    y, known = spread_norm(norm, x, spread), layer_norm_of(unwrapped(norm), hooks=True)
    if spread is None or known is None or _layers(unwrapped(mlp)) is None:
        return mlp(y)
    weight, _, eps = known
    share = spread / (variance(x) + spread + eps)  # [B, m]

    def compute(mlp: nn.Module, y: Tensor) -> Tensor:
        fc1, act, rest = _layers(mlp)
        u = fc1(y)
        squares = _scaled_weight(fc1, weight).to(share.dtype).square().sum(0)  # [hidden]
        hidden = spread_activation(act, u, (share.t().unsqueeze(-1) * squares).to(u.dtype))
        for module in rest:
            hidden = module(hidden)
        return hidden

    return call_through(mlp, compute, y)


def spread_activation(act: nn.Module, u: Tensor, s: Tensor) -> Tensor:
    """The mean of `act` over a Gaussian of mean u and variance s; exact for GELU.

    Of an activation that is not known, by the Gauss–Hermite quadrature of three points.
    """
    if activation_name(act, hooks=True) is None:
        far = (3 * s).clamp(min=torch.finfo(s.dtype).tiny).sqrt()  # whose slope is infinite at 0
        return act(u) * (2 / 3) + (act(u + far) + act(u - far)) / 6
    r = (1 + s).rsqrt()
    z = u * r
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return (act(z) + s * r * r * density) / r


def _scaled_weight(fc1: nn.Module, scale: Tensor) -> Tensor:
    """(W diag(scale))ᵀ, [D, hidden], of a layer x Wᵀ + b that may be more than its weight.

    Adapters, parametrizations, hooks and quantized layers are asked for it, row by row.
    """
    if type(fc1) is nn.Linear and altered("fc1", fc1) is None:
        return (fc1.weight * scale).t()
    rows = torch.cat([scale.new_zeros(1, len(scale)), scale.diag()]).unsqueeze(1)
    answers = fc1(rows).squeeze(1)  # [D + 1, hidden]
    return answers[1:] - answers[:1]


def _layers(mlp: nn.Module) -> tuple[nn.Module, nn.Module, list[nn.Module]] | None:
    """First layer, activation and what follows, where that is all there is."""
    parts = dict(mlp.named_children())
    plain = isinstance(mlp, nn.Sequential) and len(parts) == 3
    if not plain and (forward_of(mlp) != _MLP_CLASS or tuple(parts) != _MLP):
        return None
    if altered("mlp", mlp, deep=False, hooks=False) is not None:
        return None
    fc1, act, *rest = parts.values()
    return fc1, act, rest
