"""One slimmed block, in plain PyTorch: the definition that every back end is tested against."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimvit.ops.modules import altered
from slimvit.ops.slim_attention import masked_attention, slim_attention
from slimvit.ops.spread import spread_mlp


class BlockParts(NamedTuple):
    """The modules of one pre-norm transformer block, whatever their names in the foreign model.

    `qkv` maps D to 3·H·d (queries, keys, values); `gate`, where there is one, D to H·d. Modules
    that a model does not have are `nn.Identity`.
    """

    norm1: nn.Module
    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    gate: nn.Linear | None
    attn_norm: nn.Module
    proj: nn.Linear
    proj_drop: nn.Module
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module
    heads: int
    head_dim: int
    attn_drop: float


class ExtraKey(NamedTuple):
    """One key and one value [1, H, 1, d], with the bias of its logit, the same for all images."""

    key: Tensor
    value: Tensor
    bias: float


def zero_key(block: BlockParts, rows: int, like: Tensor) -> ExtraKey:
    """What `rows` zero rows are as keys and values: LN1 makes them all one key, counted by a bias.

    Equal to attending to the rows themselves, since `rows` equal terms of a softmax are one term
    with log(rows) added to its logit.

    Args:
        block: the block's modules.
        rows: how many zero rows there are.
        like: a token of the model, [..., D], whose width, dtype and device the rows have.

    Source: Patch Slimming (Tang et al., CVPR 2022), footnote 1, where pruned tokens are zeros.
    """
    y = block.norm1(like.new_zeros(1, 1, like.shape[-1]))
    return ExtraKey(*project_kv(block, y), math.log(rows))


def take(x: Tensor, keep: int | Tensor) -> Tensor:
    """The kept rows of x [m, B, D]: the first `keep`, or those at an index [n] or [B, n]."""
    if isinstance(keep, Tensor):
        if keep.dim() == 1:
            return x.index_select(0, keep)
        return x.gather(0, keep.t().unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    if keep > x.shape[0]:
        raise ValueError(f"keep must be at most m = {x.shape[0]}, the alive tokens, got {keep}")
    return x if keep == x.shape[0] else x[:keep]


def slim_block(
    x: Tensor,
    block: BlockParts,
    keep: int | Tensor,
    *,
    key_bias: Tensor | None = None,
    extra_key: ExtraKey | None = None,
) -> Tensor:
    """Attention of the kept over the alive tokens, then the MLP of the kept.

        y = LN1(x);  x' = x[keep] + ls1 · Attn(y[keep], y);  out = x' + ls2 · MLP(LN2(x'))

    Tokens come first and images second, so that every prefix of the tokens is contiguous.

    Args:
        x: alive tokens, [m, B, D].
        block: the block's modules.
        keep: the kept tokens: a prefix length n, or their positions [n] or [B, n], int64.
        key_bias: added to the attention logits of each alive token, [m] or [B, m].
        extra_key: one more key and value that all images share; see `zero_key`.

    Returns:
        [n, B, D]; equal to the dense block's rows `keep` where every token is alive.

    Source: Patch Slimming (Tang et al., CVPR 2022), Eq. 2 and footnote 1.
    """
    x_kept = take(x, keep)
    y = block.norm1(x)
    y_kept = take(y, keep)
    q, k, v = project_qkv(block, y_kept, y)  # [B, H, n, d], [B, H, m, d] twice
    if extra_key is not None:
        k, v, key_bias = append_key(k, v, key_bias, extra_key)
    return mlp_branch(attend(x_kept, y_kept, block, q, k, v, key_bias), block)


def attend(
    x_kept: Tensor,
    y_kept: Tensor,
    block: BlockParts,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None = None,
    policy: Tensor | None = None,
) -> Tensor:
    """x' = x[keep] + ls1 · (Attn(q, k, v) Wo + bo).

    Args:
        x_kept: the kept tokens, [n, B, D].
        y_kept: the same after LN1, for blocks that gate attention by it.
        block: the block's modules.
        q: queries, [B, H, n, d].
        k: keys, [B, H, m, d].
        v: values, [B, H, m, d].
        key_bias: added to the logits of each key, [m] or [B, m].
        policy: in training, 0 for keys that no query may see, else 1: [B, m]; see
            `masked_attention`.

    Returns:
        [n, B, D].
    """
    dropout = block.attn_drop if block.proj.training else 0.0
    if policy is None:
        a = slim_attention(q, k, v, key_bias, dropout)
    else:
        a = masked_attention(q, k, v, policy, key_bias, dropout)
    a = a.permute(2, 0, 1, 3).reshape(*x_kept.shape[:2], block.heads * block.head_dim)
    a = block.attn_norm(a)
    if block.gate is not None:
        a = a * block.gate(y_kept).sigmoid()
    return x_kept + _drop_path(block.drop_path1, block.ls1(block.proj_drop(block.proj(a))))


def mlp_branch(x: Tensor, block: BlockParts, spread: Tensor | None = None) -> Tensor:
    """x + ls2 · MLP(LN2(x)), [n, B, D]; `spread` [B, n] as in `slimvit.ops.spread`."""
    return x + _drop_path(
        block.drop_path2, block.ls2(spread_mlp(block.mlp, block.norm2, x, spread))
    )


def project_qkv(block: BlockParts, y_kept: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of `y_kept` [n, B, D], keys and values of `y` [m, B, D], as [B, H, ·, d] views."""
    if y_kept is y:
        q, k, v = _heads(block, block.qkv(y), 3)
        return block.q_norm(q), block.k_norm(k), v
    return project_q(block, y_kept), *project_kv(block, y)


def project_q(block: BlockParts, y: Tensor) -> Tensor:
    """Queries [B, H, n, d] of normed tokens [n, B, D]."""
    (q,) = _heads(block, _project(block, y, slice(0, block.heads * block.head_dim)), 1)
    return block.q_norm(q)


def project_kv(block: BlockParts, y: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, [B, H, m, d] each, of normed tokens [m, B, D]."""
    k, v = _heads(block, _project(block, y, slice(block.heads * block.head_dim, None)), 2)
    return block.k_norm(k), v


def _project(block: BlockParts, y: Tensor, rows: slice) -> Tensor:
    """The outputs `rows` of qkv, which is called whole where that does more than multiply."""
    qkv = block.qkv
    if type(qkv).forward is not nn.Linear.forward or altered("qkv", qkv) is not None:
        return qkv(y)[..., rows]
    return F.linear(y, qkv.weight[rows], None if qkv.bias is None else qkv.bias[rows])


def _heads(block: BlockParts, rows: Tensor, parts: int) -> tuple[Tensor, ...]:
    n, batch, _ = rows.shape
    return rows.view(n, batch, parts, block.heads, block.head_dim).permute(2, 1, 3, 0, 4).unbind(0)


def append_key(
    k: Tensor, v: Tensor, key_bias: Tensor | None, extra: ExtraKey
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, H, m + 1, d] with the extra one last, and the bias of each, [m + 1]."""
    # In half precision log(rows) is rounded by up to 1 %, so all other biases move along with it.
    shift = _rounded(extra.bias, k.dtype) - extra.bias
    key_bias = k.new_full((k.shape[2],), shift) if key_bias is None else key_bias + shift
    k = torch.cat([k, extra.key.expand(k.shape[0], -1, -1, -1)], dim=2)
    v = torch.cat([v, extra.value.expand(v.shape[0], -1, -1, -1)], dim=2)
    tail = key_bias.new_full((*key_bias.shape[:-1], 1), extra.bias)
    return k, v, torch.cat([key_bias, tail], dim=-1)


def _rounded(value: float, dtype: torch.dtype) -> float:
    """`value` ≥ 0 as `dtype` holds it: plain arithmetic, which tracing takes for a constant."""
    if value == 0:
        return value
    unit = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(value))
    return round(value / unit) * unit


def _drop_path(drop_path: nn.Module, branch: Tensor) -> Tensor:
    if isinstance(drop_path, nn.Identity) and altered("drop_path", drop_path, deep=False) is None:
        return branch
    return drop_path(branch.transpose(0, 1)).transpose(0, 1)  # it drops along dimension 0: images
