"""Whole blocks and whole networks in one call each: the `torch.library` ops of the C++ kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slimvit.backends import cpu
from slimvit.ops.devices import require_one_device
from slimvit.ops.folded_block import FoldedBlock
from slimvit.ops.modules import activation_name, layer_norm_of
from slimvit.ops.network import NetworkParts, why_not_plain
from slimvit.ops.slim_block import ExtraKey

_library = torch.library.Library("slimvit", "DEF")
_library.define(
    "slim_block(Tensor x, Tensor pack, SymInt n, Tensor? index=None, Tensor? key_bias=None)"
    " -> Tensor"
)
_library.define(
    "slim_vit(Tensor images, Tensor packs, int[] sizes, int[] counts, bool idle, int rows,"
    " int columns) -> Tensor"
)
_library.impl("slim_block", cpu.slim_block, "CPU")
_library.impl("slim_vit", cpu.slim_vit, "CPU")
for _name in ("slim_block", "slim_vit"):  # for inference: answers need no gradient
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("slimvit::slim_block", lib=_library)
def _slim_block(
    x: Tensor, pack: Tensor, n: int, index: Tensor | None = None, key_bias: Tensor | None = None
) -> Tensor:
    require_one_device("slim_block", x, pack, index, key_bias)
    return x.new_empty(n, x.shape[1], x.shape[2])


@torch.library.register_fake("slimvit::slim_vit", lib=_library)
def _slim_vit(
    images: Tensor,
    packs: Tensor,
    sizes: list[int],
    counts: list[int],
    idle: bool,
    rows: int,
    columns: int,
) -> Tensor:
    require_one_device("slim_vit", images, packs)
    shape = (images.shape[0], rows, columns) if rows else (images.shape[0], columns)
    return images.new_empty(shape, dtype=torch.float32)


def why_not_packed(parts: NetworkParts) -> str | None:
    """Why the C++ kernels do not compute such a network, or None if they do."""
    for number, block in enumerate(parts.blocks, 1):
        reason = why_not_plain(block)
        if reason is not None:
            return f"block {number}: {reason}"
    for name, norm in (("the norm before the blocks", parts.norm_pre), ("the norm", parts.norm)):
        if not isinstance(norm, nn.Identity) and layer_norm_of(norm) is None:
            return f"{name} is {type(norm).__name__}, not LayerNorm"
    return None


def pack_block(
    block: FoldedBlock,
    extra: ExtraKey | None = None,
    dtype: torch.dtype = torch.float32,
    lone: bool = False,
) -> Tensor:
    """What `slimvit::slim_block` takes as its weights.

    Args:
        block: a plain block, folded.
        extra: one more key and value that all images share.
        dtype: what the kernels compute in: float32, or bfloat16 accumulated in float32.
        lone: whether one or two tokens are all that it will keep, as in a last block.

    Returns:
        uint8, one-dimensional; for the instruction set that `slimvit doctor` names.
    """
    inner = block.heads * block.head_dim
    layers = (block.norm1, block.qkv, block.proj, block.norm2, block.fc1, block.fc2)
    weights = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    norms = (block.norm1, block.norm2)
    for i, norm in zip((1, 7), norms):
        weights[i] = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
    key, value = (None, None) if extra is None else (extra.key, extra.value)
    weights += [None if part is None else part.reshape(inner) for part in (key, value)]
    return cpu.pack_block(
        weights,
        dtype,
        heads=block.heads,
        head_dim=block.head_dim,
        activation=activation_name(block.act),
        eps=(block.norm1.eps, block.norm2.eps),
        extra_bias=0.0 if extra is None else extra.bias,
        lone=lone,
    )


class PackedNetwork(nn.Module):
    """A slimmed network whose weights are packed for the C++ kernels: one call for all of it.

    Args:
        parts: the network; weights are copied.
        dtype: what it computes in: float32, or bfloat16 accumulated in float32.
        choosers: packs of how each block chooses, where blocks do.
    """

    def __init__(
        self, parts: NetworkParts, dtype: torch.dtype, choosers: Sequence[Tensor] = ()
    ) -> None:
        super().__init__()
        self.counts, self.idle, self.dtype = list(parts.counts), parts.idle, dtype
        self.tokens, self.width = parts.table.shape
        self.classes = parts.heads[0].out_features if parts.heads else 0
        embedding = cpu.pack_embedding(
            parts.patch_weight,
            parts.table,
            parts.order,
            layer_norm_of(parts.norm_pre),
            dtype,
            image_size=parts.image_size,
            prefix=parts.prefix,
        )
        linears = [(head.weight, head.bias) for head in parts.heads]
        head = cpu.pack_head(layer_norm_of(parts.norm), linears, dtype, width=self.width)
        blocks = [
            pack_block(block, extra, dtype, lone=n <= 2)
            for block, extra, n in zip(parts.blocks, parts.extra_keys, parts.counts)
        ]
        packs = [embedding, *blocks, head, *choosers]
        self.sizes = [pack.numel() for pack in packs]
        self.register_buffer("packs", cpu.join(packs), persistent=False)

    def parts(self) -> list[Tensor]:
        """The packs: embedding, blocks, head, and choosers if there are any."""
        return list(self.packs.split(self.sizes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes], float32, of images [B, C, H, W]; for a network with heads."""
        return self._call(images, 0, self.classes)

    def forward_tokens(self, images: Tensor) -> Tensor:
        """Tokens after the final norm in lifetime order, [B, n_L, D] ([B, N, D] where idle)."""
        return self._call(images, self.tokens if self.idle else self.counts[-1], self.width)

    def _call(self, images: Tensor, rows: int, columns: int) -> Tensor:
        return torch.ops.slimvit.slim_vit(
            images, self.packs, self.sizes, self.counts, self.idle, rows, columns
        )
