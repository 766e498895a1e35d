"""The slimmed block for inference: what `slim_block` computes, in fewer calls."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from slimvit.backends.packed_linear import PackedLinear, packable
from slimvit.ops.modules import altered, layer_norm_of, only_drops
from slimvit.ops.slim_attention import slim_attention
from slimvit.ops.slim_block import BlockParts, ExtraKey, append_key


class FoldedBlock(nn.Module):
    """`slim_block` of a plain block whose layer scale has been folded; see `why_not`.

    At batch 1 a small transformer spends as much time between its kernels as in them, the same for
    few tokens as for many, so every call that is saved here brings the speed-up nearer the cut.

    Args:
        block: parts of the block; the weights are shared, not copied.
    """

    def __init__(self, block: BlockParts) -> None:
        super().__init__()
        self.heads, self.head_dim = block.heads, block.head_dim
        self.inner = block.heads * block.head_dim
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.qkv = PackedLinear(block.qkv.weight, block.qkv.bias)
        self.proj = PackedLinear(block.proj.weight, block.proj.bias)
        self.fc1 = PackedLinear(block.mlp[0].weight, block.mlp[0].bias)
        self.act = block.mlp[1]
        self.fc2 = PackedLinear(block.mlp[2].weight, block.mlp[2].bias)
        self._gelu = type(self.act) is nn.GELU and self.act.approximate == "none"

    @staticmethod
    def why_not(block: BlockParts) -> str | None:
        """Why a block is not plain: LayerNorm, no qk-norm, no gate, MLP = fc1, activation, fc2."""
        for name in ("q_norm", "k_norm", "attn_norm"):
            part = getattr(block, name)
            if not isinstance(part, nn.Identity):
                return f"it has {name}, a {type(part).__name__}"
        for name, part in block._asdict().items():
            reason = altered(name, part) if isinstance(part, nn.Module) else None
            if reason is not None:
                return f"{reason}, which would not run"
        for norm in (block.norm1, block.norm2):
            if layer_norm_of(norm) is None:
                return f"its norm is {type(norm).__name__}, not LayerNorm with weights"
        if block.gate is not None:
            return "its attention is gated"
        if not isinstance(block.mlp, nn.Sequential):
            return f"its MLP is {type(block.mlp).__name__}, not two layers and an activation"
        for layer in (block.proj, block.mlp[0], block.mlp[2]):
            if type(layer) is not nn.Linear:
                return f"it has {type(layer).__name__} in place of Linear"
        for name in ("ls1", "ls2"):  # after the layers that they are folded into
            part = getattr(block, name)
            if not isinstance(part, nn.Identity):
                return f"it has {name}, a {type(part).__name__}"
        for name in ("proj_drop", "drop_path1", "drop_path2"):
            part = getattr(block, name)
            if not only_drops(part):
                return f"its {name} is {type(part).__name__}, not dropout"
        return None

    def forward(self, x: Tensor, keep: int, extra_key: ExtraKey | None = None) -> Tensor:
        """The kept rows after the block, [n, B, D], of the alive tokens [m, B, D]; n = `keep`."""
        packed = packable(x)
        x_kept = x if keep == x.shape[0] else x[:keep]
        q, k, v = self._project(_layer_norm(self.norm1, x), keep, packed)
        key_bias = None
        if extra_key is not None:
            k, v, key_bias = append_key(k, v, None, extra_key)
        a = slim_attention(q, k, v, key_bias)
        a = a.permute(2, 0, 1, 3).reshape(keep, x.shape[1], self.inner)
        x_kept = self.proj(a, packed=packed, add=x_kept)
        hidden = self.fc1(_layer_norm(self.norm2, x_kept), packed=packed, gelu=self._gelu)
        if not self._gelu:
            hidden = self.act(hidden)
        return self.fc2(hidden, packed=packed, add=x_kept)

    def _project(self, y: Tensor, keep: int, packed: bool) -> tuple[Tensor, ...]:
        """Queries [B, H, n, d] of the kept rows, keys and values [B, H, m, d] of all."""
        m, batch, _ = y.shape
        shape = (batch, 3, self.heads, self.head_dim)
        if keep == m:
            qkv = self.qkv(y, packed=packed)
            return qkv.view(m, *shape).permute(2, 1, 3, 0, 4).unbind(0)
        q = self.qkv(y[:keep], slice(0, self.inner), packed=packed)
        kv = self.qkv(y, slice(self.inner, None), packed=packed)
        k, v = kv.view(m, batch, 2, *shape[2:]).permute(2, 1, 3, 0, 4).unbind(0)
        return q.view(keep, batch, *shape[2:]).permute(1, 2, 0, 3), k, v


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
