"""Linear layers of a slimmed block: LayerNorm folded in, rows gathered, epilogues fused.

    out = act((x - mean) · rstd · W'ᵀ + b') + residual,   W' = W · diag(γ),  b' = b + W β

The norm never touches x: the product takes x as it is, and the epilogue puts mean and rstd right,
since (x - mean) W'ᵀ = x W'ᵀ - mean · (row sums of W'). In float32 x is normalised as it is loaded.

Of a token that stands for several, the norm's variance is increased by their spread, and act is its
mean over them: in column j their deviations have the variance spread · rstd² · Σ_c W'_jc².
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    activate,
    activate_spread,
    architecture,
    fence,
    mean_rstd,
    part_width,
    power_of_two,
    store_stats,
)
from .configs import Config, lookup


@triton.jit(do_not_specialize=["batch", "n", "m", "x_rows", "residual_rows", "out_rows"])
def _slim_linear(
    x,
    stats,
    weight,
    row_sums,
    bias,
    residual,
    index,
    out,
    tail_out,
    out_stats,
    batch,
    n,
    m,
    x_rows,
    residual_rows,
    out_rows,
    columns,
    tail_columns,
    x_stride,
    out_stride,
    x_group,
    out_group,
    eps,
    spread,
    squares,
    K: tl.constexpr,
    X_PARTS: tl.constexpr,
    X_PARTS_PADDED: tl.constexpr,
    OUT_PARTS: tl.constexpr,
    PART: tl.constexpr,
    NORM: tl.constexpr,
    SPREAD: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATHER_X: tl.constexpr,
    GATHER_RESIDUAL: tl.constexpr,
    TAIL: tl.constexpr,
    EMIT: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    exact: tl.constexpr = x.dtype.element_ty == tl.float32

    # The head of the launch computes n rows of each image and the first columns, the tail all m
    # rows and the other columns: queries, then keys and values.
    per_image = n
    first = 0
    width = columns
    if TAIL:
        head_tiles = tl.cdiv(batch * n, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
        tail = tile >= head_tiles
        tile = tl.where(tail, tile - head_tiles, tile)
        per_image = tl.where(tail, m, n)
        first = tl.where(tail, columns, 0)
        width = tl.where(tail, tail_columns, columns)
        out = tl.where(tail, tail_out, out)
        out_stride = width
    rows = batch * per_image

    # Programs that run together share rows and columns, which so come from the L2 cache.
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(width, BLOCK_N)
    start_m = tile // (GROUP_M * tiles_n) * GROUP_M
    size_m = tl.minimum(tiles_m - start_m, GROUP_M)
    tile_m = start_m + tile % (GROUP_M * tiles_n) % size_m
    tile_n = tile % (GROUP_M * tiles_n) // size_m

    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < rows
    row = tl.minimum(row, rows - 1)
    image = row // per_image
    place = row - image * per_image
    source = place
    if GATHER_X or GATHER_RESIDUAL:
        source = tl.load(index + image * n + tl.minimum(place, n - 1)).to(tl.int32)
        if TAIL:
            source = tl.where(tail, place, source)
    x_row = image * x_rows + (source if GATHER_X else place)
    # Clamped where tiles overhang, but only for the weight: a clamp hides from the compiler that
    # neighbours lie side by side, and stores would be of one value each.
    place_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column = first + (place_n if EVEN else tl.minimum(place_n, width - 1))
    mask = live[:, None]
    if not EVEN:
        mask = mask & (place_n < width)[None, :]

    k = tl.arange(0, BLOCK_K)
    x_at = x + group * x_group + x_row.to(tl.int64)[:, None] * x_stride + k[None, :]
    w_at = weight + group * columns * K + column[None, :] * K + k[:, None]
    if SPREAD:
        apart = tl.load(spread + x_row)
        mean, rstd = mean_rstd(stats, x_row, eps + apart, K, X_PARTS, X_PARTS_PADDED)
        apart *= rstd * rstd
    elif NORM:
        mean, rstd = mean_rstd(stats, x_row, eps, K, X_PARTS, X_PARTS_PADDED)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a = tl.load(x_at + start)
            w = tl.load(w_at + start)
        else:
            a = tl.load(x_at + start, mask=(k < K - start)[None, :], other=0.0)
            w = tl.load(w_at + start, mask=(k < K - start)[:, None], other=0.0)
        if NORM and exact:
            a = (a - mean[:, None]) * rstd[:, None]
        acc = tl.dot(a, w, acc, input_precision=PRECISION)

    if NORM and not exact:
        sums = tl.load(row_sums + column)
        acc = (acc - mean[:, None] * sums[None, :]) * rstd[:, None]
    if BIAS:
        acc += tl.load(bias + group * columns + column)[None, :]
    if SPREAD:
        fence()
        s = apart[:, None] * tl.load(squares + column)[None, :]
        acc = activate_spread(acc, s, ACTIVATION, exact)
    else:
        acc = activate(acc, ACTIVATION, exact)
    out_row = image * out_rows + place
    if TAIL:
        out_row = row
    if RESIDUAL:
        residual_row = image * residual_rows + (source if GATHER_RESIDUAL else place)
        at = residual + residual_row.to(tl.int64)[:, None] * out_stride + place_n[None, :]
        acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    value = acc.to(out.dtype.element_ty)
    at = out + group * out_group + out_row.to(tl.int64)[:, None] * out_stride + place_n[None, :]
    tl.store(at, value, mask=mask)
    if EMIT:
        part = tile_n * (BLOCK_N // PART)
        store_stats(out_stats, out_row, live, part, value.to(tl.float32), OUT_PARTS, PART)


def slim_qkv(
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    row_sums: Tensor,
    bias: Tensor,
    n: int,
    inner: int,
    *,
    eps: float,
    index: Tensor | None = None,
    precision: str = "ieee",
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries of the kept rows, keys and values of all rows, of LN(x), in one launch.

    Args:
        x: alive tokens, [B, m, D].
        stats: their statistics, [B, m, parts, 2], float32; see `row_stats`.
        weight: [3·inner, D] with the norm's weight folded in, dtype of `x`.
        row_sums: sums of its rows, [3·inner], float32.
        bias: [3·inner] with the norm's bias folded in, float32.
        n: kept tokens of each image: the first, or those at `index`.
        inner: H·d.
        eps: of the norm.
        index: places of the kept tokens, [B, n], int64.
        precision: of float32 products, "ieee" or "tf32".
        config: instead of the table's.

    Returns:
        Queries [B, n, inner] and keys with values [B, m, 2·inner].
    """
    batch, m, width = x.shape
    q = x.new_empty(batch, n, inner)
    kv = x.new_empty(batch, m, 2 * inner)
    config = config or _config("qkv", x, width, batch * m)
    tiles = _tiles(batch * n, inner, config) + _tiles(batch * m, 2 * inner, config)
    _launch(
        (tiles, 1),
        config,
        *(x, stats, weight, row_sums, bias, None, index, q, kv, None),
        *(batch, n, m, m, 0, n, inner, 2 * inner, width, inner, 0, 0, eps, None, None),
        K=width,
        X_PARTS=stats.shape[2],
        NORM=True,
        GATHER_X=index is not None,
        TAIL=True,
        PRECISION=precision,
    )
    return q, kv


def slim_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stage: str = "linear",
    n: int | None = None,
    groups: int = 1,
    stats: Tensor | None = None,
    row_sums: Tensor | None = None,
    eps: float = 0.0,
    activation: str = "none",
    residual: Tensor | None = None,
    index: Tensor | None = None,
    spread: Tensor | None = None,
    squares: Tensor | None = None,
    out: Tensor | None = None,
    emit: bool = False,
    precision: str = "ieee",
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """act(LN(x) Wᵀ + b) + residual of rows, and the statistics of the result where asked.

    Args:
        x: [B, rows, groups·K].
        weight: [groups·N, K], dtype of `x`; the norm's weight folded in where there is a norm.
            Each group of columns of `x` has its own rows of it and its own columns of the result.
        bias: [groups·N], float32, the norm's bias folded in, or None.
        stage: which configurations of the table to use.
        n: rows of each image to compute, the first of `x`; None for all.
        groups: see `weight`.
        stats: statistics of `x`, [B, rows, parts, 2], float32: there is a norm.
        row_sums: sums of the rows of `weight`, [N], float32, where there is a norm.
        eps: of the norm.
        activation: "none", "gelu", "gelu_tanh" or "quick_gelu".
        residual: [B, rows', N], added after the activation: its first rows, or those at `index`.
        index: which rows of `residual` (where there is one, else of `x`) to take, [B, n], int64.
        spread: of the tokens that each row of `x` stands for, [B, rows], float32, which `stats` do
            not include; where there is a norm, and with `squares`.
        squares: sums of the squares of the rows of `weight`, [N], float32.
        out: where to write the first n rows of each image, [B, ≥ n, groups·N], contiguous; not
            `residual` unless its rows are its first.
        emit: give the statistics of the result as well; N must be a multiple of 16.
        precision: of float32 products, "ieee" or "tf32".
        config: instead of the table's.

    Returns:
        [B, n, groups·N] (or `out`), and its statistics [B, rows of it, parts, 2] or None.
    """
    batch, x_rows, x_stride = x.shape
    inputs = x_stride // groups
    columns = weight.shape[0] // groups
    n = x_rows if n is None else n
    if out is None:
        out = x.new_empty(batch, n, groups * columns)
    config = config or _config(stage, x, inputs, batch * n)
    config = config.with_columns(columns, part_width(columns) if emit else 0)
    out_stats = None
    if emit:
        parts = columns // part_width(columns)
        out_stats = x.new_empty(batch, out.shape[1], parts, 2, dtype=torch.float32)
    _launch(
        (_tiles(batch * n, columns, config), groups),
        config,
        *(x, stats, weight, row_sums, bias, residual, index, out, None, out_stats),
        *(batch, n, n, x_rows, 0 if residual is None else residual.shape[1], out.shape[1]),
        *(columns, 0, x_stride, groups * columns, inputs, columns, eps, spread, squares),
        K=inputs,
        X_PARTS=1 if stats is None else stats.shape[2],
        OUT_PARTS=1 if out_stats is None else out_stats.shape[2],
        PART=part_width(columns),
        NORM=stats is not None,
        ACTIVATION=activation,
        GATHER_X=index is not None and residual is None,
        GATHER_RESIDUAL=index is not None and residual is not None,
        EMIT=emit,
        PRECISION=precision,
    )
    return out, out_stats


def _config(stage: str, x: Tensor, width: int, rows: int) -> Config:
    return lookup(stage, architecture(x.device), x.element_size(), width, rows)


def _tiles(rows: int, columns: int, config: Config) -> int:
    return triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)


def _launch(grid: tuple[int, int], config: Config, *arguments: object, **flags: object) -> None:
    bias, residual, columns, tail_columns = arguments[4], arguments[5], *arguments[16:18]
    flags = {"OUT_PARTS": 1, "PART": 1, "ACTIVATION": "none", "GATHER_X": False} | flags
    flags = {"GATHER_RESIDUAL": False, "TAIL": False, "EMIT": False} | flags
    _slim_linear[grid](
        *arguments,
        **flags,
        X_PARTS_PADDED=power_of_two(flags["X_PARTS"]),
        SPREAD=arguments[-1] is not None,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        EVEN=columns % config.block_n == 0 and tail_columns % config.block_n == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=8,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )
