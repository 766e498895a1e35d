"""A slimmed network of fused blocks: weights folded once, one op for each block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimvit.backends.fused import BlockWeights
from slimvit.ops import fused_block  # noqa: F401  defines the ops
from slimvit.ops.folded_block import FoldedBlock
from slimvit.ops.modules import activation_name, layer_norm_of
from slimvit.ops.network import NetworkParts, why_not_plain

_WIDEST_HEAD = 128  # what a tile of the attention kernels has room for
# What a block may keep for its keys and values to be folded away, and how many bytes of a row fit
# the registers that are left: see kernels/last_attention.py and csrc/cuda/last_attention.cu.
_LAST_TOKENS, _LAST_QUERIES, _LAST_BYTES = 2, 32, {"triton": 1536, "cuda": 2048}


class FusedBlock(nn.Module):
    """`slim_block` of a plain block in one op: `slimvit::fused_block`.

    Args:
        block: a plain block, folded; weights are copied.
        dtype: what it computes in: float16 or bfloat16, accumulated in float32, or float32.
        zero_rows: pruned tokens that remain as zero rows.
        last: whether one or two tokens are all that it will ever keep, as in a last block.
        tf32: whether float32 products may be in TF32.
        backend: whose kernels, "triton" or "cuda".
    """

    def __init__(
        self,
        block: FoldedBlock,
        dtype: torch.dtype,
        *,
        zero_rows: int = 0,
        last: bool = False,
        tf32: bool = False,
        backend: str = "triton",
    ) -> None:
        super().__init__()
        self.heads, self.zero_rows, self.tf32 = block.heads, zero_rows, tf32
        self.backend = backend
        self.activation = activation_name(block.act)
        self.eps = [block.norm1.eps, block.norm2.eps]
        weights = _fold(block, dtype, last)
        for name, tensor in weights._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(
        self,
        x: Tensor,
        keep: int | Tensor,
        stats: Tensor | None = None,
        *,
        key_bias: Tensor | None = None,
        idle: bool = False,
        spread: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The kept rows after the block.

        Args:
            x: alive tokens, [B, m, D], in the block's dtype.
            keep: the kept tokens: a prefix length n, or their positions [B, n], int64.
            stats: statistics of `x`, which the op before gave; None to compute them.
            key_bias: added to the attention logits of each alive token, [m] or [B, m].
            idle: give all m rows, those not kept as they were; for a prefix only.
            spread: of the tokens that each alive one stands for, [B, m], float32, which `stats`
                include; None where each stands for itself alone.

        Returns:
            [B, n, D] (or [B, m, D]), and its statistics.
        """
        index = keep if isinstance(keep, Tensor) else None
        return torch.ops.slimvit.fused_block(
            x,
            stats,
            [self._buffers[name] for name in BlockWeights._fields],
            keep if index is None else index.shape[1],
            self.heads,
            self.activation,
            self.eps,
            self.zero_rows,
            idle,
            self.tf32,
            index,
            key_bias,
            spread,
            self.backend,
        )


class FusedNetwork(nn.Module):
    """A slimmed network up to its final norm, for GPUs.

    Args:
        parts: the network; weights are copied.
        dtype: what it computes in: float16 or bfloat16, accumulated in float32, or float32.
        tf32: whether float32 products may be in TF32.
        backend: whose kernels, "triton" or "cuda".
    """

    def __init__(
        self,
        parts: NetworkParts,
        dtype: torch.dtype,
        tf32: bool = False,
        backend: str = "triton",
    ) -> None:
        super().__init__()
        self.backend = backend
        self.counts, self.idle, self.dtype = list(parts.counts), parts.idle, dtype
        self.prefix, self.tf32 = parts.prefix, tf32
        self.register_buffer("patch_weight", parts.patch_weight.to(dtype), persistent=False)
        self.register_buffer("table", parts.table.float().contiguous(), persistent=False)
        self.register_buffer("order", parts.order.clone(), persistent=False)
        self.norm_pre, self.norm = parts.norm_pre.to(dtype), parts.norm.to(dtype)
        queries = [n * block.heads for block, n in zip(parts.blocks, self.counts)]
        folds = self.table.shape[1] * dtype.itemsize <= _LAST_BYTES[backend]
        self.blocks = nn.ModuleList(
            FusedBlock(
                block,
                dtype,
                zero_rows=rows,
                last=folds and n <= _LAST_TOKENS and count <= _LAST_QUERIES,
                tf32=tf32,
                backend=backend,
            )
            for block, rows, n, count in zip(parts.blocks, parts.zero_rows, self.counts, queries)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Tokens after the final norm in lifetime order, [B, n_L, D] ([B, N, D] where idle)."""
        x, stats = self.embed(images)
        for block, n in zip(self.blocks, self.counts):
            x, stats = block(x, n, stats, idle=self.idle)
        return self.norm(x).to(self.dtype)  # autocast would have norms in float32

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens ahead of the first block, [B, N, D], and their statistics where known."""
        x, stats = torch.ops.slimvit.patch_embedding(
            images, self.patch_weight, self.table, self.order, self.prefix, self.tf32, self.backend
        )
        if isinstance(self.norm_pre, nn.Identity):
            return x, stats
        return self.norm_pre(x).to(self.dtype), None


def why_not_fused(parts: NetworkParts, backend: str = "triton") -> str | None:
    """Why the GPU kernels of a back end do not compute such a network, or None if they do."""
    for number, block in enumerate(parts.blocks, 1):
        reason = why_not_plain(block)
        if reason is None and block.head_dim > _WIDEST_HEAD:
            reason = f"head_dim must be at most {_WIDEST_HEAD}, got {block.head_dim}"
        if reason is not None:
            return f"block {number}: {reason}"
    return None


@torch.no_grad()
def _fold(block: FoldedBlock, dtype: torch.dtype, last: bool) -> BlockWeights:
    inner, d = block.heads * block.head_dim, block.head_dim
    qkv, qkv_bias = fold_norm(block.norm1, block.qkv)
    fc1, fc1_bias = fold_norm(block.norm2, block.fc1)
    qkv, fc1 = qkv.to(dtype), fc1.to(dtype)
    keys = qkv[inner : 2 * inner].view(block.heads, d, -1).transpose(1, 2).flatten(0, 1)
    return BlockWeights(
        qkv=qkv,
        qkv_bias=qkv_bias,
        qkv_sums=qkv.float().sum(1),
        proj=block.proj.weight.detach().to(dtype, copy=True).contiguous(),
        proj_bias=_bias(block.proj),
        fc1=fc1,
        fc1_bias=fc1_bias,
        fc1_sums=fc1.float().sum(1),
        fc2=block.fc2.weight.detach().to(dtype, copy=True).contiguous(),
        fc2_bias=_bias(block.fc2),
        keys=keys.contiguous() if last else qkv.new_empty(0),
        fc1_squares=fc1.float().square().sum(1),
    )


def fold_norm(norm: nn.LayerNorm, linear: nn.Module) -> tuple[Tensor, Tensor]:
    """LN(x) Wᵀ + b = x̂ (W diag(γ))ᵀ + (b + W β): the weight and the bias of the right-hand side."""
    gamma, beta, _ = layer_norm_of(norm)
    weight = linear.weight.float()
    return (weight * gamma.float()).contiguous(), _bias(linear) + weight @ beta.float()


def _bias(linear: nn.Module) -> Tensor:
    if linear.bias is None:
        return linear.weight.new_zeros(linear.weight.shape[0], dtype=torch.float32)
    return linear.bias.detach().float().clone()
