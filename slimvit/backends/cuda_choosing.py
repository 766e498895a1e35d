"""The CUDA C++ kernels that choose tokens for each image: the calls that take tensors.

Functions have the names and the meaning of those of `slimvit.kernels`; what that package says of
shapes and dtypes is not said again here. Tokens are float16 or bfloat16, scores float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimvit.backends import cuda

MOST_TOKENS = 2048  # what an image's scores and importances leave of the least shared memory
WIDEST_MERGE = 1536  # see absorb_merge.cu


def absorb_scores(
    x: Tensor,
    stats: Tensor,
    q: Tensor,
    kv: Tensor,
    heads: int,
    prefix: int,
    candidates: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float,
    key_bias: Tensor | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """What tokens are chosen by: importances, scores, and the cosines between them."""
    batch, m, width = x.shape
    tokens, inner = q.shape[1:]
    d = inner // heads
    cuda.eights(width=width, head_dim=d)
    cuda.at_most("m", m, MOST_TOKENS)
    importance, score, shrink = x.new_empty(3, batch, m, dtype=torch.float32).unbind(0)
    of_heads = x.new_empty(batch, heads, m, dtype=torch.float32)
    cosine = x.new_empty(batch, m, m, dtype=torch.float32)
    cuda.call(
        cuda.module().absorb_scores,
        x,
        x=x,
        stats=stats,
        q=q,
        kv=kv,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        key_bias=key_bias,
        normed=torch.empty_like(x),
        shrink=shrink,
        of_heads=of_heads,
        importance=importance,
        score=score,
        cosine=cosine,
        batch=batch,
        m=m,
        width=width,
        x_parts=stats.shape[2],
        tokens=tokens,
        heads=heads,
        d=d,
        prefix=prefix,
        candidates=candidates,
        scale=d**-0.5,
        eps=eps,
    )
    return importance, score, cosine


def absorb_select(score: Tensor, cosine: Tensor, n: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Positions of the kept tokens, and which of those each token goes into."""
    batch, m = score.shape
    cuda.at_most("m", m, MOST_TOKENS)
    index = score.new_empty(batch, n, dtype=torch.int64)
    into = score.new_empty(batch, m, dtype=torch.int32)
    cuda.run(
        cuda.module().absorb_select,
        score,
        score=score,
        cosine=cosine,
        index=index,
        into=into,
        batch=batch,
        m=m,
        n=n,
        prefix=prefix,
    )
    return index, into


def absorb_merge(
    x: Tensor,
    stats: Tensor,
    importance: Tensor,
    index: Tensor,
    into: Tensor,
    *,
    size: Tensor | None = None,
    spread: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kept tokens with those that go into them, statistics, sizes, their log, and spreads."""
    (batch, m, width), n = x.shape, index.shape[1]
    cuda.eights(width=width)
    cuda.at_most("width", width, WIDEST_MERGE)
    part, out = cuda.part_width(width), x.new_empty(batch, n, width)
    out_stats = x.new_empty(batch, n, width // part, 2, dtype=torch.float32)
    out_size, out_bias, out_spread = (x.new_empty(batch, n, dtype=torch.float32) for _ in range(3))
    cuda.call(
        cuda.module().absorb_merge,
        x,
        x=x,
        stats=stats,
        importance=importance,
        index=index,
        into=into,
        size=size,
        spread=spread,
        out=out,
        out_stats=out_stats,
        out_size=out_size,
        out_bias=out_bias,
        out_spread=out_spread,
        batch=batch,
        m=m,
        n=n,
        width=width,
        part=part,
    )
    return out, out_stats, out_size, out_bias, out_spread


def top_tokens(scores: Tensor, n: int, prefix: int, *, weight: Tensor | None = None) -> Tensor:
    """Positions of the first `prefix` tokens and of the highest scores among the others."""
    batch, m = scores.shape[:2]
    cuda.at_most("m", m, MOST_TOKENS)
    index = scores.new_empty(batch, n, dtype=torch.int64)
    sizes = {"batch": batch, "m": m, "n": n, "prefix": prefix}
    function = cuda.module().top_tokens
    if weight is None:
        cuda.run(function, scores, scores=scores, weight=None, index=index, channels=0, **sizes)
        return index
    channels = scores.shape[2]
    cuda.eights(channels=channels)
    cuda.call(
        function, scores, scores=scores, weight=weight, index=index, channels=channels, **sizes
    )
    return index
