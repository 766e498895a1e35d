"""What a selector ahead of a block leaves of an image's tokens, by fused GPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from slimvit.backends.fused_checks import (
    check_images,
    kernel_set,
    nothing,
    on_device,
    precision_of,
    require,
)
from slimvit.backends.fused_weights import SelectorWeights, selector_weights

__all__ = ["WIDEST_SELECTOR", "SelectorWeights", "selected_tokens"]

WIDEST_SELECTOR = 128  # channels of a head, whose matrix kernels hold on chip


def selected_tokens(
    x: Tensor,
    weights: list[Tensor],
    n: int,
    prefix: int,
    packages: int,
    eps: float,
    tf32: bool = False,
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor]:
    """The n patches that a selector favours most, and the others as one package token.

        package = Σ_pruned P_i x_i / Σ_pruned P_i,  P_i the probability of keeping patch i

    Args:
        x: alive tokens, [B, m, D]: prefix, p patches, packages.
        weights: the `SelectorWeights`.
        n: patches to keep, 0 < n < p.
        prefix: leading tokens that are always kept.
        packages: package tokens of earlier selectors, which are always kept.
        eps: of the selector's norm.
        tf32: whether float32 products may be in TF32.
        backend: whose kernels.

    Returns:
        Prefix, kept patches, packages and the new one, [B, prefix + n + packages + 1, D]; their
        statistics; and which of the alive they are, int64, ascending: the new package is m, as if
        it came after them. Among patches of equal scores the earlier is kept.
    """
    part = selector_weights(backend, weights)
    heads, c, _ = part.embed.shape
    dtype, device = part.embed.dtype, part.embed.device
    fits = x.dim() == 3 and x.dtype == dtype and x.device == device
    rule = f"x must be [B, m, D] with D = {heads * c}, {str(dtype).removeprefix('torch.')}"
    require(backend, fits and x.shape[2] == heads * c, f"{rule}, on {device}", x)
    rule = f"a selector's heads must have at most {WIDEST_SELECTOR} channels"
    require(backend, c <= WIDEST_SELECTOR, rule, c)
    (batch, m, width), count = x.shape, prefix + n + packages + 1
    check_images(backend, batch)
    least = min(prefix, packages)
    require(backend, least >= 0, "prefix and packages must be at least 0", least)
    p = m - prefix - packages
    rule = f"n must be more than 0 and less than the {p} patches of {m} tokens"
    require(backend, 0 < n < p, rule, n)
    if not batch:
        return *nothing(x, count, width), x.new_empty(0, count, dtype=torch.int64)
    x, kernels, others = x.contiguous(), kernel_set(backend), (prefix, packages)
    with on_device(x):
        verdict, weight = kernels.selector_judge(
            x, *part, *others, eps=eps, precision=precision_of(tf32)
        )
        _, share, index = kernels.selector_choose(verdict, weight, n, *others)
        out, stats = kernels.package_tokens(x, index, share, prefix)
    return out, stats, index
