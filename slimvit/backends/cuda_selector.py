"""The CUDA C++ kernels of selectors: the calls that take tensors.

Functions have the names and the meaning of those of `slimvit.kernels`; what that package says of
shapes and dtypes is not said again here. Tokens are float16 or bfloat16, scores float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimvit.backends import cuda
from slimvit.backends.cuda_choosing import MOST_TOKENS

_ROWS = 32  # patches of a tile: see kSelectorRows in ops.h


def selector_judge(
    x: Tensor,
    embed: Tensor,
    embed_bias: Tensor,
    judge1: Tensor,
    bias1: Tensor,
    judge2: Tensor,
    bias2: Tensor,
    judge3: Tensor,
    bias3: Tensor,
    weigh1: Tensor,
    weigh1_bias: Tensor,
    weigh2: Tensor,
    weigh2_bias: Tensor,
    prefix: int,
    packages: int,
    *,
    eps: float,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """What each head says of each patch, and how much it counts there."""
    (batch, m, _), (heads, c, half) = x.shape, judge1.shape
    p, local = m - prefix - packages, (c + 1) // 2
    tiles = -(-p // _ROWS)
    means, verdict, weight = x.new_empty(3, batch, heads, p, dtype=torch.float32).unbind(0)
    cuda.call(
        cuda.module().selector_judge,
        x,
        x=x,
        embed=embed,
        embed_bias=embed_bias,
        judge1=judge1,
        bias1=bias1,
        judge2=judge2,
        bias2=bias2,
        judge3=judge3,
        bias3=bias3,
        weigh1=weigh1,
        weigh1_bias=weigh1_bias,
        weigh2=weigh2,
        weigh2_bias=weigh2_bias,
        local=x.new_empty(batch, heads, p, local),
        sums=x.new_empty(batch, heads, tiles, c - local, dtype=torch.float32),
        means=means,
        verdict=verdict,
        weight=weight,
        batch=batch,
        m=m,
        p=p,
        prefix=prefix,
        heads=heads,
        c=c,
        half=half,
        quarter=judge2.shape[2],
        hidden=weigh1.shape[0],
        eps=eps,
    )
    return verdict, weight


def selector_choose(
    verdict: Tensor, weight: Tensor, n: int, prefix: int, packages: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The n patches of the highest scores, and how much of the package each other one is."""
    batch, heads, p = verdict.shape
    cuda.at_most("p", p, MOST_TOKENS)
    score, share = verdict.new_empty(2, batch, p).unbind(0)
    index = verdict.new_empty(batch, prefix + n + packages + 1, dtype=torch.int64)
    cuda.run(
        cuda.module().selector_choose,
        verdict,
        verdict=verdict,
        weight=weight,
        score=score,
        share=share,
        index=index,
        batch=batch,
        heads=heads,
        p=p,
        n=n,
        prefix=prefix,
        packages=packages,
    )
    return score, share, index


def package_tokens(x: Tensor, index: Tensor, share: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """The tokens at an index, and after them the package."""
    (batch, m, width), count = x.shape, index.shape[1]
    cuda.eights(width=width)
    out, part = x.new_empty(batch, count, width), cuda.part_width(width)
    stats = x.new_empty(batch, count, width // part, 2, dtype=torch.float32)
    cuda.call(
        cuda.module().package_tokens,
        x,
        x=x,
        index=index,
        share=share,
        out=out,
        out_stats=stats,
        batch=batch,
        m=m,
        p=share.shape[1],
        prefix=prefix,
        count=count,
        width=width,
        part=part,
    )
    return out, stats
