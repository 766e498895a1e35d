"""Where Triton's kernels run in tests, and what they may err: at most twice as much as PyTorch.

They run compiled where there is a CUDA GPU that they are for, and else in Triton's interpreter, on
CPU tensors.
"""

import math
import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slimvit import _extensions
from slimvit.backends import why_not

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
if (reason := why_not("triton", DEVICE)) is not None:
    pytest.skip(reason, allow_module_level=True)

kernels = _extensions.load("kernels")
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device for Triton here")
_no_bfloat16 = pytest.mark.skipif(
    DEVICE.type != "cuda", reason="Triton's interpreter computes bfloat16 wrongly: it needs a GPU"
)
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=_no_bfloat16)]
# PyTorch's error is zero by luck now and then, as where one key has all of a softmax.
FLOOR = {torch.float32: 3e-7, torch.float16: 1e-4, torch.bfloat16: 1e-3}
EPS = 1e-5
ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
}


class Random:
    """Random tensors on the device, always the same."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal values that every floating dtype holds exactly enough: rounded to bfloat16."""
        values = torch.randn(shape, generator=self.generator)
        return values.bfloat16().to(DEVICE, dtype)

    def weight(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return (self(rows, columns) * columns**-0.5).to(dtype)

    def index(self, batch: int, n: int, m: int) -> Tensor:
        """Distinct places in no order, others for each image, [B, n]."""
        orders = [torch.randperm(m, generator=self.generator)[:n] for _ in range(batch)]
        return torch.stack(orders).to(DEVICE)


def rows_of(x: Tensor, keep: int | Tensor) -> Tensor:
    """The kept rows of x [B, m, D]: the first, or those at an index [B, n]."""
    if isinstance(keep, Tensor):
        return x.gather(1, keep[..., None].expand(-1, -1, x.shape[2]))
    return x[:, :keep]


def normalise(x: Tensor, spread: Tensor | None = None) -> Tensor:
    """Without weights; with a spread [B, m], which increases the variance."""
    if spread is None:
        return F.layer_norm(x, x.shape[-1:], eps=EPS)
    apart = x - x.mean(-1, keepdim=True)
    return apart * (variance(x) + spread + EPS).rsqrt()[..., None]


def variance(x: Tensor) -> Tensor:
    return x.var(-1, correction=0)


def hidden_of(x: Tensor, act: str, fc1: Tensor, bias: Tensor, spread: Tensor | None) -> Tensor:
    """act(LN(x) Wᵀ + b) of tokens [B, m, D] that stand for several: its mean over them."""
    u = F.linear(normalise(x, spread), fc1, bias)
    if spread is None or act == "none":
        return ACTIVATE[act](u)
    share = spread / (variance(x) + spread + EPS)
    s = share[..., None] * fc1.square().sum(1)
    r = (1 + s).rsqrt()
    z = u * r
    density = (-z * z / 2).exp() / math.sqrt(2 * math.pi)
    return (ACTIVATE[act](z) + s * r * r * density) / r


def stats_of(x: Tensor, spread: Tensor | None = None) -> Tensor:
    """What kernels know of rows, [B, m, parts, 2]: mean and squared deviations of each part.

    The first part's include width times the spread [B, m].
    """
    parts = x.double().unflatten(-1, (-1, min(64, x.shape[-1] & -x.shape[-1])))
    mean = parts.mean(-1, keepdim=True)
    squares = (parts - mean).square().sum(-1)
    if spread is not None:
        squares[..., 0] += x.shape[-1] * spread
    return torch.stack([mean.squeeze(-1), squares], -1).float()


def distance(got: Tensor, wanted: Tensor) -> float:
    """The relative error, in the Frobenius norm."""
    assert got.shape == wanted.shape, f"{list(got.shape)} instead of {list(wanted.shape)}"
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@torch.no_grad()
def check(got: Tensor, formula: Callable[..., Tensor], *inputs: Tensor | None) -> None:
    """Whether `got` errs at most twice as much as `formula` does in its dtype, about float64."""

    def answer(dtype: torch.dtype) -> Tensor:
        return formula(*(None if tensor is None else tensor.to(dtype) for tensor in inputs))

    wanted = answer(torch.float64)
    torchs = distance(answer(got.dtype), wanted)
    assert distance(got, wanted) <= max(2 * torchs, FLOOR[got.dtype])


def check_stats(stats: Tensor, x: Tensor, spread: Tensor | None = None) -> None:
    """Whether `stats` are those of `x`, with its spread, but for float32's rounding."""
    wanted = stats_of(x, spread)
    assert stats.shape == wanted.shape
    assert stats.dtype == torch.float32
    scale = x.double().abs().max().item()
    torch.testing.assert_close(stats[..., 0], wanted[..., 0], rtol=0, atol=3e-7 * scale)
    torch.testing.assert_close(stats[..., 1], wanted[..., 1], rtol=3e-6, atol=1e-6)
