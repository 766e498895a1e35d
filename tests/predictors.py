"""Predictors of every kind that kernels know, in float64, and which tokens they keep."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from references import ACTIVATIONS, randomise
from torch import Tensor, nn

from slimvit.ops import PredictorParts


@functools.cache
def predictor_of(width: int, act: str = "gelu", eps: float = 1e-6) -> PredictorParts:
    hidden = max(16, width // 4 // 16 * 16)
    layers = nn.LayerNorm(width, eps=eps), nn.Linear(width, hidden), nn.Linear(hidden, 1)
    norm, down, out = (randomise(layer, seed).double() for seed, layer in enumerate(layers))
    return PredictorParts(norm, down, ACTIVATIONS[act](), out)


@torch.no_grad()
def check_predictors(keep: Callable[[PredictorParts, Tensor, int], Tensor]) -> None:
    """`keep` takes the right n tokens of x [m, 1, D], the first and by each kind others."""
    m, n = 63, 32
    x = torch.randn(m, 256, 64, generator=torch.Generator().manual_seed(0))
    x = x[:, 230:231]  # of the images one where the two GELUs take others
    x = x * torch.linspace(0.1, 2, m)[:, None, None]  # variances about as large as eps
    all_kept = []
    for act, eps in (("gelu", 1e-6), ("gelu", 0.5), ("gelu_tanh", 1e-6), ("quick_gelu", 1e-6)):
        norm, down, _, out = parts = predictor_of(64, act, eps)
        score = out(parts.act(down(norm(x.double()))))[1:, :, 0].t()
        wanted = F.pad(score.topk(n - 1).indices.sort(1).values + 1, (1, 0)).tolist()
        assert keep(parts, x, n).tolist() == wanted
        assert wanted not in all_kept
        all_kept.append(wanted)
