"""Patch embedding: patches read where they lie in the image, tokens written in lifetime order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import architecture, part_width, store_stats
from .configs import Config, lookup


@triton.jit(do_not_specialize=["batch"])
def _patch_embedding(
    images,
    weight,
    table,
    order,
    out,
    out_stats,
    batch,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    PREFIX: tl.constexpr,
    TOKENS: tl.constexpr,
    D: tl.constexpr,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K: tl.constexpr = CHANNELS * PATCH_HEIGHT * PATCH_WIDTH
    AREA: tl.constexpr = PATCH_HEIGHT * PATCH_WIDTH
    ACROSS: tl.constexpr = WIDTH // PATCH_WIDTH
    dtype = out.dtype.element_ty
    tiles_n: tl.constexpr = D // BLOCK_N
    tile_m = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < batch * TOKENS
    row = tl.minimum(row, batch * TOKENS - 1)
    image = row // TOKENS
    place = row - image * TOKENS
    patch = tl.load(order + place).to(tl.int32) - PREFIX
    is_patch = patch >= 0  # prefix tokens are their row of the table alone
    patch = tl.maximum(patch, 0)
    corner = (patch // ACROSS) * (PATCH_HEIGHT * WIDTH) + (patch % ACROSS) * PATCH_WIDTH
    at = images + image.to(tl.int64) * (CHANNELS * HEIGHT * WIDTH) + corner

    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        within = k % AREA
        pixel = (
            (k // AREA) * (HEIGHT * WIDTH) + within // PATCH_WIDTH * WIDTH + within % PATCH_WIDTH
        )
        mask = is_patch[:, None] & (k < K)[None, :]
        a = tl.load(at[:, None] + pixel[None, :], mask=mask, other=0.0).to(weight.dtype.element_ty)
        w_at = weight + column[None, :] * K + k[:, None]
        if K % BLOCK_K == 0:
            w = tl.load(w_at)
        else:
            w = tl.load(w_at, mask=(k < K)[:, None], other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    acc += tl.load(table + place[:, None] * D + column[None, :])
    value = acc.to(dtype)
    tl.store(out + row.to(tl.int64)[:, None] * D + column[None, :], value, mask=live[:, None])
    part = tile_n * (BLOCK_N // PART)
    store_stats(out_stats, row, live, part, value.to(tl.float32), D // PART, PART)


def patch_embedding(
    images: Tensor,
    weight: Tensor,
    table: Tensor,
    order: Tensor,
    prefix: int,
    *,
    precision: str = "ieee",
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens in lifetime order: patches times the weight, plus a row of the table for each token.

    Args:
        images: [B, C, H, W], contiguous, of any floating dtype.
        weight: [D, C, ph, pw], D a multiple of 16; its dtype is the result's.
        table: what each token starts from, bias and position included, in lifetime order, [N, D],
            float32.
        order: which token comes where in lifetime order, [N], int64.
        prefix: class, distillation and register tokens, ahead of the patches.
        precision: of float32 products, "ieee" or "tf32".
        config: instead of the table's.

    Returns:
        [B, N, D], and its statistics [B, N, parts, 2], float32.
    """
    batch, channels, height, width = images.shape
    tokens, columns = table.shape
    out = weight.new_empty(batch, tokens, columns)
    rows = batch * tokens
    config = config or lookup(
        "embedding", architecture(images.device), weight.element_size(), columns, rows
    )
    part = part_width(columns)
    config = config.with_columns(columns, part)
    tiles = columns // config.block_n
    stats = weight.new_empty(batch, tokens, columns // part, 2, dtype=torch.float32)
    _patch_embedding[(triton.cdiv(rows, config.block_m) * tiles,)](
        *(images, weight, table, order, out, stats, batch),
        CHANNELS=channels,
        HEIGHT=height,
        WIDTH=width,
        PATCH_HEIGHT=weight.shape[2],
        PATCH_WIDTH=weight.shape[3],
        PREFIX=prefix,
        TOKENS=tokens,
        D=columns,
        PART=part,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )
    return out, stats
