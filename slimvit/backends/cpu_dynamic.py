"""The C++ kernels that choose tokens for each image: how they choose, packed, and their calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimvit.backends.cpu import run_network
from slimvit.backends.cpu_module import (
    address,
    call,
    make_pack,
    module,
    on_cpu,
    pack_bytes,
    require,
    threads,
)


def pack_attention(
    width: int,
    head_tokens: int,
    reach: int,
    dtype: torch.dtype,
    *,
    threshold: float = 0.0,
    before: int = 0,
    after: int = 0,
) -> Tensor:
    """Scores by attention and redundancy, and absorption, as the kernels read it.

    Args:
        width: D.
        head_tokens: leading tokens that the head reads.
        reach: patches that are looked at for each that goes.
        dtype: what the block computes in, float32 or bfloat16.
        threshold: scores below it go, where importance adds up to one; 0 for a fixed number.
        before: with a threshold, tokens that reach the block of an average image, and
        after: that it keeps of one.

    Returns:
        uint8, one-dimensional.
    """
    options = {
        "head_tokens": head_tokens,
        "reach": reach,
        "threshold": threshold,
        "before": before,
        "after": after,
    }
    return _pack("attention", (None,) * 5, width, dtype, **options)


def pack_predictor(
    weights: Sequence[Tensor | None],
    dtype: torch.dtype,
    *,
    activation: str,
    eps: float,
) -> Tensor:
    """Scores by a small module, as the kernels read it.

    Args:
        weights: weight and bias [D] of the norm, weight [r, D] and bias [r] (or None) of the layer
            down, weight [1, r] of the layer to one score.
        dtype: what it computes in, float32 or bfloat16.
        activation: "gelu", "gelu_tanh" or "quick_gelu".
        eps: of the norm.

    Returns:
        uint8, one-dimensional.

    Raises:
        SlimvitError: r is no multiple of 16.
    """
    hidden, width = weights[2].shape
    options = {"hidden": hidden, "activation": activation, "eps": eps}
    return _pack("predictor", weights, width, dtype, **options)


def _pack(
    scores: str,
    weights: Sequence[Tensor | None],
    width: int,
    dtype: torch.dtype,
    *,
    head_tokens: int = 0,
    reach: int = 0,
    threshold: float = 0.0,
    before: int = 0,
    after: int = 0,
    hidden: int = 0,
    activation: str = "gelu",
    eps: float = 0.0,
) -> Tensor:
    options = {
        "scores": scores,
        "width": width,
        "head_tokens": head_tokens,
        "reach": reach,
        "threshold": threshold,
        "before": before,
        "after": after,
        "hidden": hidden,
        "activation": activation,
        "eps": eps,
    }
    return make_pack(module().pack_chooser, options, weights, dtype)


def pack_selector(
    weights: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    heads: int,
    patches: int | None,
    fewest: int,
    packages: int,
    eps: float,
) -> Tensor:
    """A selector, as the kernels read it.

    Args:
        weights: weight and bias of the norm [D], of the layers of every head [H, in, out] and
            [H, out], c to c, c to c / 2, c / 2 to c / 4 and c / 4 to 2, and of the layers that
            weigh the heads, [H / 2, H] and [H, H / 2].
        dtype: what it computes in, float32 or bfloat16.
        heads: H.
        patches: how many it keeps; None for as many as it favours,
        fewest: but so many.
        packages: of earlier selectors.
        eps: of the norm.

    Returns:
        uint8, one-dimensional.

    Raises:
        SlimvitError: the channels of a head, c, are no multiple of 16.
    """
    options = {
        "width": weights[0].numel(),
        "heads": heads,
        "patches": patches or 0,
        "fewest": fewest,
        "packages": packages,
        "eps": eps,
    }
    return make_pack(module().pack_selector, options, weights, dtype)


def select_tokens(x: Tensor, pack: Tensor, n: int, prefix: int) -> tuple[Tensor, Tensor]:
    """A packed selector of the tokens x [m, B, D] of each image; float32.

    Returns:
        The n tokens that are left, [n, B, D]: prefix, kept patches, packages of earlier selectors,
        the new one; which of the m each is, [B, n], int64, m for the new package.
    """
    rule = "x must be [m, B, D], float32"
    require(x.dim() == 3 and x.dtype == torch.float32 and on_cpu(x), rule, x)
    m, batch, width = x.shape
    require(0 < n <= m, f"n must be in [1, m] = [1, {m}]", n)
    x = x if x.stride(2) == 1 else x.contiguous()
    out = x.new_empty(n, batch, width)
    place = torch.empty(batch, n, dtype=torch.int64, device="cpu")
    call(
        module().select_tokens,
        *pack_bytes("pack", pack),
        *(address(x), x.stride(1), x.stride(0)),
        *(address(out), out.stride(1), out.stride(0)),
        *(address(place), width, batch, m, n, prefix, threads()),
    )
    return out, place


def dynamic_block(
    x: Tensor,
    pack: Tensor,
    chooser: Tensor,
    n: int,
    prefix: int,
    size: Tensor | None = None,
    spread: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A packed block that keeps n of the alive tokens x [m, B, D] of each image; float32.

    `size` [B, m] tells how many tokens each stands for, None that each stands for itself; `spread`
    [B, m] their mean squared deviation from their average, per channel, None for none.

    Returns:
        The kept tokens [n, B, D]; their positions [B, n], ascending; for each pruned token which
        of the n it went into, [B, m - n], -1 where it was dropped; the sizes and the spreads,
        [B, n] each.
    """
    rule = "x must be [m, B, D], float32"
    require(x.dim() == 3 and x.dtype == torch.float32 and on_cpu(x), rule, x)
    m, batch, width = x.shape
    size, spread = (
        _per_token(name, of, (batch, m)) for name, of in (("size", size), ("spread", spread))
    )
    rule = f"n must be in [prefix + 1, m - 1] = [{prefix + 1}, {m - 1}]"
    require(prefix >= 0 and prefix < n < m, rule, n)
    x = x if x.stride(2) == 1 else x.contiguous()
    out = x.new_empty(n, batch, width)
    kept = torch.empty(batch, n, dtype=torch.int64, device="cpu")
    into = torch.full((batch, m - n), -1, dtype=torch.int64, device="cpu")
    sizes, spreads = x.new_empty(batch, n), x.new_empty(batch, n)
    call(
        module().dynamic_block,
        *pack_bytes("pack", pack),
        *pack_bytes("chooser", chooser),
        *(address(x), x.stride(1), x.stride(0)),
        *(address(out), out.stride(1), out.stride(0)),
        *(address(size), address(spread), address(kept), address(into)),
        *(address(sizes), address(spreads)),
        *(width, batch, m, n, prefix, threads()),
    )
    return out, kept, into, sizes, spreads


def _per_token(name: str, of: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    if of is None:
        return None
    fits = of.shape == shape and of.is_floating_point() and on_cpu(of)
    require(fits, f"{name} must be [B, m] = {list(shape)}, floating point", of)
    return of.float().contiguous()


def dynamic_vit(
    images: Tensor,
    packs: Tensor,
    sizes: Sequence[int],
    counts: Sequence[int],
    rows: int,
    columns: int,
) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W], float32 or bfloat16, through a packed network that chooses for each.

    `packs` are the embedding, the blocks, the head and a chooser for each block one after the
    other, of that many bytes: how the block chooses, or the selector ahead of it; nothing where it
    keeps the first n of `counts`. Returns logits [B, columns] where `rows` is 0, else tokens after
    the final norm, [B, rows, columns], float32, and the places of the tokens that each block kept,
    block after block, [B, Σ n], int64: N and more for packages, and -1 after the last where each
    image keeps a number of its own and `counts` are how many at most.
    """
    kept = torch.empty(images.shape[0], sum(counts), dtype=torch.int64, device="cpu")
    return run_network(images, packs, (sizes, counts, False, rows, columns), kept), kept
