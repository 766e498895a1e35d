"""What several kernels share: activations, row statistics, and which device compiles for what."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu")
# Whether kernels run in Triton's interpreter, on CPU tensors: triton reads this when it decorates.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)

# Φ(x) - 1/2 = x P(x²) within 3e-5 on |x| ≤ 4 and exactly 1/2 at 4: well under a half-precision
# rounding of the product, at a third of the instructions of erf.
_P0: tl.constexpr = tl.constexpr(0.3988053798675537)
_P1: tl.constexpr = tl.constexpr(-0.06606367230415344)
_P2: tl.constexpr = tl.constexpr(0.009581082500517368)
_P3: tl.constexpr = tl.constexpr(-0.0010209493339061737)
_P4: tl.constexpr = tl.constexpr(7.617470691911876e-05)
_P5: tl.constexpr = tl.constexpr(-3.7082920698594535e-06)
_P6: tl.constexpr = tl.constexpr(1.0438540698487486e-07)
_P7: tl.constexpr = tl.constexpr(-1.2769983959159958e-09)
# φ(z) = exp2(a z² + b), the density of normal values
_DENSITY_A: tl.constexpr = tl.constexpr(-0.7213475204444817)
_DENSITY_B: tl.constexpr = tl.constexpr(-1.3257480647361592)


@triton.jit
def _gelu_half(x):
    c = tl.minimum(tl.maximum(x, -4.0), 4.0)
    t = c * c
    p = _P7 * t + _P6
    p = p * t + _P5
    p = p * t + _P4
    p = p * t + _P3
    p = p * t + _P2
    p = p * t + _P1
    p = p * t + _P0
    return x * (0.5 + c * p)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """`ACTIVATION` of float32 values; EXACT for results that are kept in float32."""
    if ACTIVATION == "gelu":
        x = x * 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) if EXACT else _gelu_half(x)
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    return x


@triton.jit
def fence():
    """What follows is not loaded before: for epilogues whose rows would crowd out the registers."""
    if not _INTERPRETED:  # Triton's interpreter has no barriers
        tl.debug_barrier()


@triton.jit
def activate_spread(u, s, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """`ACTIVATION` of float32 values about u of variance s: their mean, for GELU of normal ones.

    (act(z) + (1 - r²) φ(z)) / r with r = 1 / sqrt(1 + s) and z = u r: act(u) where s = 0.
    """
    if ACTIVATION != "none":
        r = tl.rsqrt(1.0 + s)
        z = u * r
        bump = s * tl.exp2(z * z * _DENSITY_A + _DENSITY_B)  # s φ(z)
        u = r * ((1.0 + s) * activate(z, ACTIVATION, EXACT) + bump)
    return u


@triton.jit
def mean_variance(stats, rows, WIDTH: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr):
    """Mean and variance of rows from `stats` [·, PARTS, 2]: mean, squared deviations of each part.

    Parts are equally wide. Deviations are summed about each part's own mean, so nothing cancels.
    """
    part = tl.arange(0, PADDED)
    at = stats + rows[:, None] * (2 * PARTS) + 2 * part[None, :]
    inside = (part < PARTS)[None, :]
    means = tl.load(at, mask=inside, other=0.0)
    squares = tl.load(at + 1, mask=inside, other=0.0)
    mean = tl.sum(means, axis=1) / PARTS
    apart = tl.where(inside, means - mean[:, None], 0.0)
    squares += (WIDTH // PARTS) * apart * apart
    return mean, tl.sum(squares, axis=1) / WIDTH


@triton.jit
def mean_rstd(
    stats, rows, eps, WIDTH: tl.constexpr, PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr
):
    """Mean and 1/std of rows from their `stats`; `eps` is one number, or one of each row."""
    mean, variance = mean_variance(stats, rows, WIDTH, PARTS, PARTS_PADDED)
    return mean, tl.rsqrt(variance + eps)


@triton.jit
def store_stats(stats, rows, live, first, values, PARTS: tl.constexpr, PART: tl.constexpr):
    """Mean and squared deviations of `values` [M, N], N / PART parts of each row, into `stats`."""
    count: tl.constexpr = values.shape[1] // PART
    values = tl.reshape(values, (values.shape[0], count, PART))
    mean = tl.sum(values, axis=2) / PART
    apart = values - mean[:, :, None]
    part = first + tl.arange(0, count)
    at = stats + rows.to(tl.int64)[:, None] * (2 * PARTS) + 2 * part[None, :]
    tl.store(at, mean, mask=live[:, None])
    tl.store(at + 1, tl.sum(apart * apart, axis=2), mask=live[:, None])


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value`."""
    return triton.next_power_of_2(value)


def part_width(width: int) -> int:
    """How many columns of a row have statistics of their own: the greatest power of two to 64."""
    return min(64, width & -width)


def architecture(device: torch.device) -> int:
    """Compute capability, such as 90; the newest in the table where kernels are interpreted."""
    if device.type != "cuda":
        return 100
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
