"""Norm and MLP of tokens that stand for several, against what they make of drawn members."""

import pytest
import timm
import torch
import torch.nn.functional as F
from references import off, randomise
from timm.layers import Mlp, QuickGELU, SwiGLU
from torch import nn

from slimvit.ops.spread import spread_activation, spread_mlp, spread_norm, variance

WIDTH = 64


def members(count: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One token [1, 1, D] and members of it [count, 1, D], apart by `spread` per channel."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(1, 1, WIDTH, generator=generator, dtype=torch.float64)
    apart = torch.randn(count, 1, WIDTH, generator=generator, dtype=torch.float64)
    apart = apart - apart.mean(0)
    apart = apart - apart.mean(2, keepdim=True)
    apart = apart * (spread / apart.square().mean()).sqrt()
    return x, x + apart


def made_norm() -> nn.LayerNorm:
    return randomise(nn.LayerNorm(WIDTH, eps=1e-6), 1).double()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("s", [0.0, 1e-3, 0.3, 2.0, 30.0])
def test_activation_is_a_mean(approximate, s):
    """Of GELU over a Gaussian, by a fine sum."""
    u = torch.linspace(-6, 6, 97, dtype=torch.float64)
    points = torch.linspace(-9, 9, 4001, dtype=torch.float64)[:, None]
    weights = torch.exp(-0.5 * points.square())
    wanted = (weights * F.gelu(u + s**0.5 * points)).sum(0) / weights.sum()
    got = spread_activation(nn.GELU(approximate), u, torch.full_like(u, s))
    assert (got - wanted).abs().max() < (1e-6 if approximate == "none" else 2e-3)


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), QuickGELU()], ids=str)
def test_without_a_spread_all_is_as_ever(act):
    u = torch.linspace(-6, 6, 97, dtype=torch.float64)
    assert torch.equal(spread_activation(act, u, torch.zeros_like(u)), act(u))
    x, _ = members(1, 1.0)
    norm, mlp = made_norm(), randomise(Mlp(WIDTH, 2 * WIDTH), 2).double()
    none = torch.zeros(1, 1)
    assert off(spread_norm(norm, x, none), norm(x)) < 1e-12
    assert off(spread_mlp(mlp, norm, x, none), mlp(norm(x))) < 1e-12
    assert torch.equal(spread_mlp(mlp, norm, x, None), mlp(norm(x)))


@pytest.mark.parametrize("spread", [0.02, 0.2, 1.0])
def test_norm_is_the_mean_of_the_members(spread):
    x, drawn = members(20_000, spread)
    norm = made_norm()
    assert (variance(drawn).mean() - variance(x)).item() == pytest.approx(spread, rel=0.05)
    wanted = norm(drawn).mean(0, keepdim=True)
    error = off(spread_norm(norm, x, torch.full((1, 1), spread)), wanted)
    assert error < 0.01
    assert error < off(norm(x), wanted) / 5


@pytest.mark.parametrize("spread", [0.02, 0.2, 1.0])
def test_mlp_is_the_mean_of_the_members(spread):
    x, drawn = members(20_000, spread)
    norm, mlp = made_norm(), randomise(Mlp(WIDTH, 2 * WIDTH), 2).double()
    wanted = mlp(norm(drawn)).mean(0, keepdim=True)
    error = off(spread_mlp(mlp, norm, x, torch.full((1, 1), spread)), wanted)
    assert error < 0.02
    assert error < off(mlp(norm(x)), wanted) / 4


def test_an_mlp_of_another_kind_is_applied_to_the_norm():
    x, _ = members(1, 1.0)
    norm, spread = made_norm(), torch.full((1, 1), 0.5)
    mlp = randomise(SwiGLU(WIDTH, 2 * WIDTH), 2).double()
    assert torch.equal(spread_mlp(mlp, norm, x, spread), mlp(spread_norm(norm, x, spread)))


def test_a_norm_of_another_kind_is_applied_as_it_is():
    x, _ = members(1, 1.0)
    norm = timm.layers.RmsNorm(WIDTH).double()
    assert torch.equal(spread_norm(norm, x, torch.full((1, 1), 0.5)), norm(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_rounds_little(dtype):
    x, _ = members(1, 1.0)
    norm, mlp = made_norm(), randomise(Mlp(WIDTH, 2 * WIDTH), 2).double()
    spread = torch.full((1, 1), 0.5)
    wanted = spread_mlp(mlp, norm, x, spread)
    got = spread_mlp(mlp.to(dtype), norm.to(dtype), x.to(dtype), spread)
    assert got.dtype == dtype
    assert off(got.double(), wanted) < 16 * torch.finfo(dtype).eps
