"""A selector and the block that it stands before, for GPUs: its op and its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimvit.backends import fused_selector
from slimvit.backends.fused_selector import SelectorWeights
from slimvit.ops.choosers import SelectorParts
from slimvit.ops.devices import require_one_device
from slimvit.ops.fused_block import row_statistics
from slimvit.ops.fused_vit import FusedBlock

_library = torch.library.Library("slimvit", "FRAGMENT")
_library.define(
    "selected_tokens(Tensor x, Tensor[] weights, int n, int prefix, int packages, float eps,"
    " bool tf32=False, str backend='triton') -> (Tensor, Tensor, Tensor)"
)
for _key in ("CUDA", "CPU"):  # CPU: interpreted or emulated, in tests
    _library.impl("selected_tokens", fused_selector.selected_tokens, _key)
_library.impl("selected_tokens", torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("slimvit::selected_tokens", lib=_library)
def _selected_tokens(
    x: Tensor,
    weights: list[Tensor],
    n: int,
    prefix: int,
    packages: int,
    eps: float,
    tf32: bool = False,
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor]:
    require_one_device("selected_tokens", x, weights)
    out = x.new_empty(x.shape[0], prefix + n + packages + 1, x.shape[2])
    return out, row_statistics(out), out.new_empty(out.shape[:2], dtype=torch.int64)


class Selecting(nn.Module):
    """A block ahead of which a selector keeps some patches and makes a package of the others.

    Args:
        parts: the selector; weights are copied.
        block: the block.
        dtype: what it computes in.
    """

    def __init__(self, parts: SelectorParts, block: FusedBlock, dtype: torch.dtype) -> None:
        super().__init__()
        self.block, self.patches, self.packages = block, parts.patches, parts.packages
        self.eps = parts.selector.eps
        for name, tensor in fold_selector(parts.selector, dtype)._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(
        self, x: Tensor, stats: Tensor | None, sizes: list[Tensor], n: int, prefix: int
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        """The first n tokens that the selector leaves, after the block.

        Args:
            x: alive tokens, [B, m, D].
            stats: their statistics, which nothing here reads.
            sizes: none, for every token stands for itself alone.
            n: tokens that the block keeps.
            prefix: leading tokens that are always kept.

        Returns:
            The tokens [B, n, D], their statistics, no sizes, and which of the alive they are,
            [B, n], int64, the new package as m.
        """
        x, stats, index = self.select(x, self.patches, prefix)
        x, stats = self.block(x, n, stats)
        return x, stats, sizes, index[:, :n]

    def select(self, x: Tensor, patches: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the selector leaves if it keeps so many patches: see `selected_tokens`."""
        return torch.ops.slimvit.selected_tokens(
            x,
            [self._buffers[name] for name in SelectorWeights._fields],
            patches,
            prefix,
            self.packages,
            self.eps,
            self.block.tf32,
            self.block.backend,
        )


@torch.no_grad()
def fold_selector(selector: nn.Module, dtype: torch.dtype) -> SelectorWeights:
    """A `slimvit.dynamic.selector.Selector` as kernels take it."""

    def values(tensor: Tensor, kind: torch.dtype = torch.float32) -> Tensor:
        return tensor.detach().to(kind, copy=True).contiguous()

    embed = selector.embed.weight.float()
    bias = selector.embed.bias.float() + selector.norm_bias.float() @ embed
    of_norm = selector.norm_weight.float().transpose(1, 2)
    keep, prune = selector.judge3.weight.float().unbind(-1)
    keep_bias, prune_bias = selector.judge3.bias.float()[:, 0].unbind(-1)
    return SelectorWeights(
        embed=values(of_norm * embed, dtype),
        embed_bias=values(bias[:, 0]),
        judge1=values(selector.judge1.weight, dtype),
        bias1=values(selector.judge1.bias[:, 0]),
        judge2=values(selector.judge2.weight, dtype),
        bias2=values(selector.judge2.bias[:, 0]),
        judge3=values(keep - prune),
        bias3=values(keep_bias - prune_bias),
        weigh1=values(selector.weigh1.weight),
        weigh1_bias=values(selector.weigh1.bias),
        weigh2=values(selector.weigh2.weight),
        weigh2_bias=values(selector.weigh2.bias),
    )
