"""The second half of a block in one launch, for narrow models.

    x' = x[kept] + a W_oᵀ + b_o;   out = x' + act(ŷ W_1ᵀ + b_1) W_2ᵀ + b_2,   ŷ = (x' - mean) · rstd

A program holds whole rows of x' in registers and takes the hidden channels a few at a time, so
that neither x' nor the hidden layer is ever written. Tiles are powers of two, so a row of 192
channels is held as 128 + 64; 256 channels are the widest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import activate, activate_spread, architecture, part_width, store_stats
from .configs import Config, lookup

WIDEST = 256


def halves(width: int) -> tuple[int, int] | None:
    """A width as one or two powers of two of at least 16, the greater first; None if it is not."""
    left = 1 << (width.bit_length() - 1)
    right = width - left
    if width > WIDEST or left < 16 or right & (right - 1) or 0 < right < 16:
        return None
    return left, right


@triton.jit(do_not_specialize=["batch", "n", "x_rows", "out_rows"])
def _slim_mlp(
    attended,
    proj_weight,
    proj_bias,
    x,
    index,
    spread,
    squares,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    out,
    out_stats,
    batch,
    n,
    x_rows,
    out_rows,
    eps,
    INNER: tl.constexpr,
    HIDDEN: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PART: tl.constexpr,
    GATHER: tl.constexpr,
    SPREAD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    D: tl.constexpr = LEFT + RIGHT
    dtype = out.dtype.element_ty
    exact: tl.constexpr = dtype == tl.float32
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < batch * n
    row = tl.minimum(row, batch * n - 1)
    image = row // n
    place = row - image * n
    source = place
    if GATHER:
        source = tl.load(index + image * n + place).to(tl.int32)
    left = tl.arange(0, LEFT)
    right = LEFT + tl.arange(0, RIGHT if RIGHT > 0 else LEFT)

    # x', whole rows of it
    x_at = x + (image * x_rows + source).to(tl.int64)[:, None] * D
    acc_l = tl.load(x_at + left[None, :]).to(tl.float32) + tl.load(proj_bias + left)[None, :]
    if RIGHT > 0:
        acc_r = tl.load(x_at + right[None, :]).to(tl.float32) + tl.load(proj_bias + right)[None, :]
    k = tl.arange(0, BLOCK_K)
    a_at = attended + row.to(tl.int64)[:, None] * INNER + k[None, :]
    for start in range(0, INNER, BLOCK_K):
        a = tl.load(a_at + start)
        w = tl.load(proj_weight + left[None, :] * INNER + start + k[:, None])
        acc_l = tl.dot(a, w, acc_l, input_precision=PRECISION)
        if RIGHT > 0:
            w = tl.load(proj_weight + right[None, :] * INNER + start + k[:, None])
            acc_r = tl.dot(a, w, acc_r, input_precision=PRECISION)

    mean = tl.sum(acc_l, axis=1)
    if RIGHT > 0:
        mean += tl.sum(acc_r, axis=1)
    mean = mean / D
    y_l = acc_l - mean[:, None]
    square = tl.sum(y_l * y_l, axis=1)
    if RIGHT > 0:
        y_r = acc_r - mean[:, None]
        square += tl.sum(y_r * y_r, axis=1)
    variance = square / D
    if SPREAD:
        apart = tl.load(spread + row)
        variance += apart
    rstd = tl.rsqrt(variance + eps)
    if SPREAD:
        apart *= rstd * rstd
    y_l = (y_l * rstd[:, None]).to(dtype)
    acc_l += tl.load(fc2_bias + left)[None, :]
    if RIGHT > 0:
        y_r = (y_r * rstd[:, None]).to(dtype)
        acc_r += tl.load(fc2_bias + right)[None, :]

    channel = tl.arange(0, BLOCK_N)
    for start in range(0, HIDDEN, BLOCK_N):
        hidden = start + channel
        w_at = fc1_weight + hidden[None, :] * D
        h = tl.dot(y_l, tl.load(w_at + left[:, None]), input_precision=PRECISION)
        if RIGHT > 0:
            h = tl.dot(y_r, tl.load(w_at + right[:, None]), h, input_precision=PRECISION)
        h += tl.load(fc1_bias + hidden)[None, :]
        if SPREAD:
            s = apart[:, None] * tl.load(squares + hidden)[None, :]
            h = activate_spread(h, s, ACTIVATION, exact)
        else:
            h = activate(h, ACTIVATION, exact)
        h = h.to(dtype)
        w_at = fc2_weight + hidden[:, None]
        acc_l = tl.dot(h, tl.load(w_at + left[None, :] * HIDDEN), acc_l, input_precision=PRECISION)
        if RIGHT > 0:
            w = tl.load(w_at + right[None, :] * HIDDEN)
            acc_r = tl.dot(h, w, acc_r, input_precision=PRECISION)

    out_row = image * out_rows + place
    at = out + out_row.to(tl.int64)[:, None] * D
    value = acc_l.to(dtype)
    tl.store(at + left[None, :], value, mask=live[:, None])
    store_stats(out_stats, out_row, live, 0, value.to(tl.float32), D // PART, PART)
    if RIGHT > 0:
        value = acc_r.to(dtype)
        tl.store(at + right[None, :], value, mask=live[:, None])
        store_stats(out_stats, out_row, live, LEFT // PART, value.to(tl.float32), D // PART, PART)


def slim_mlp(
    attended: Tensor,
    x: Tensor,
    proj: tuple[Tensor, Tensor],
    fc1: tuple[Tensor, Tensor],
    fc2: tuple[Tensor, Tensor],
    *,
    eps: float,
    activation: str,
    index: Tensor | None = None,
    spread: Tensor | None = None,
    squares: Tensor | None = None,
    out: Tensor | None = None,
    precision: str = "ieee",
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Projection of what was attended, residual, LN, MLP and residual of the kept rows.

    Args:
        attended: [B, n, H·d], H·d a multiple of 16.
        x: alive tokens, [B, m, D], of which `halves` can hold a row.
        proj: weight [D, H·d], dtype of `x`, and bias [D], float32.
        fc1: weight [hidden, D] with the norm's weight folded in, hidden a multiple of 16, and bias
            [hidden], float32, with the norm's bias folded in.
        fc2: weight [D, hidden], and bias [D], float32.
        eps: of the norm.
        activation: "gelu", "gelu_tanh" or "quick_gelu".
        index: places of the kept tokens in `x`, [B, n], int64; None for the first n.
        spread: of the tokens that each kept one stands for, [B, n], float32: the norm and the
            activation are as `slim_linear` says; with `squares`.
        squares: sums of the squares of the rows of fc1's weight, [hidden], float32.
        out: where to write the first n rows of each image, [B, ≥ n, D], contiguous.
        precision: of float32 products, "ieee" or "tf32".
        config: instead of the table's.

    Returns:
        [B, n, D] (or `out`), and its statistics, [B, rows of it, parts, 2], float32.
    """
    batch, n, inner = attended.shape
    width, hidden = fc2[0].shape
    left, right = halves(width)
    out = x.new_empty(batch, n, width) if out is None else out
    parts = width // part_width(width)
    out_stats = x.new_empty(batch, out.shape[1], parts, 2, dtype=torch.float32)
    config = config or lookup("mlp", architecture(x.device), x.element_size(), width, batch * n)
    _slim_mlp[(triton.cdiv(batch * n, config.block_m),)](
        *(attended, *proj, x, index, spread, squares, *fc1, *fc2, out, out_stats),
        *(batch, n, x.shape[1], out.shape[1], eps),
        INNER=inner,
        HIDDEN=hidden,
        LEFT=left,
        RIGHT=right,
        PART=part_width(width),
        GATHER=index is not None,
        SPREAD=spread is not None,
        ACTIVATION=activation,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=min(config.block_n, hidden & -hidden),
        BLOCK_K=min(config.block_k, inner & -inner),
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )
    return out, out_stats
