"""A network whose blocks choose their tokens for each image, for GPUs: its ops and its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimvit.backends import fused_dynamic
from slimvit.backends.fused_weights import BlockWeights
from slimvit.ops.choosers import (
    AbsorbParts,
    ChooserParts,
    PredictorParts,
    SelectorParts,
    candidates,
)
from slimvit.ops.devices import require_one_device
from slimvit.ops.fused_block import row_statistics
from slimvit.ops.fused_selector import Selecting
from slimvit.ops.fused_vit import FusedBlock, FusedNetwork, fold_norm
from slimvit.ops.modules import activation_name, layer_norm_of
from slimvit.ops.network import NetworkParts

_library = torch.library.Library("slimvit", "FRAGMENT")
_library.define(
    "absorb_block(Tensor x, Tensor? stats, Tensor[] sizes, Tensor[] weights, Tensor[] norm, int n,"
    " int heads, int prefix, int head_tokens, int candidates, str activation, float[] eps,"
    " bool tf32=False, str backend='triton') -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "predicted_tokens(Tensor x, Tensor? stats, Tensor[] weights, int n, int prefix,"
    " str activation, float eps, bool tf32=False, str backend='triton') -> Tensor"
)
for _name in ("absorb_block", "predicted_tokens"):
    for _key in ("CUDA", "CPU"):  # CPU: interpreted or emulated, in tests
        _library.impl(_name, getattr(fused_dynamic, _name), _key)
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("slimvit::absorb_block", lib=_library)
def _absorb_block(
    x: Tensor,
    stats: Tensor | None,
    sizes: list[Tensor],
    weights: list[Tensor],
    norm: list[Tensor],
    n: int,
    heads: int,
    prefix: int,
    head_tokens: int,
    candidates: int,
    activation: str,
    eps: list[float],
    tf32: bool = False,
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    require_one_device("absorb_block", x, stats, sizes, weights, norm)
    out = x.new_empty(x.shape[0], n, x.shape[2])
    sizes = (x.new_empty(x.shape[0], n, dtype=torch.float32) for _ in range(3))
    return out, row_statistics(out), *sizes, _index(x, n)


@torch.library.register_fake("slimvit::predicted_tokens", lib=_library)
def _predicted_tokens(
    x: Tensor,
    stats: Tensor | None,
    weights: list[Tensor],
    n: int,
    prefix: int,
    activation: str,
    eps: float,
    tf32: bool = False,
    backend: str = "triton",
) -> Tensor:
    require_one_device("predicted_tokens", x, stats, weights)
    return _index(x, n)


def _index(x: Tensor, n: int) -> Tensor:
    return x.new_empty(x.shape[0], n, dtype=torch.int64)


class _Absorbing(nn.Module):
    """A block that keeps n tokens and averages the others into them."""

    def __init__(self, parts: AbsorbParts, block: FusedBlock, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.head_tokens, self.block = parts.head_tokens, block
        weight, bias, _ = layer_norm_of(norm)
        self.register_buffer("norm_weight", weight.detach().float().clone(), persistent=False)
        self.register_buffer("norm_bias", bias.detach().float().clone(), persistent=False)

    def forward(
        self, x: Tensor, stats: Tensor | None, sizes: list[Tensor], n: int, prefix: int
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        block = self.block
        x, stats, *sizes, index = torch.ops.slimvit.absorb_block(
            x,
            stats,
            sizes,
            [block._buffers[name] for name in BlockWeights._fields],
            [self.norm_weight, self.norm_bias],
            n,
            block.heads,
            prefix,
            self.head_tokens,
            candidates(x.shape[1], n, prefix),
            block.activation,
            block.eps,
            block.tf32,
            block.backend,
        )
        return x, stats, sizes, index


class _Predicting(nn.Module):
    """A block that keeps the n tokens of the highest predicted scores."""

    @torch.no_grad()
    def __init__(self, parts: PredictorParts, block: FusedBlock, dtype: torch.dtype) -> None:
        super().__init__()
        self.block, self.eps = block, parts.norm.eps
        self.activation = activation_name(parts.act)
        down, bias = fold_norm(parts.norm, parts.down)
        spare = -len(down) % 16  # channels that are zero before and after the activation
        down = F.pad(down, (0, 0, 0, spare)).to(dtype)
        tensors = {
            "down": down,
            "down_bias": F.pad(bias, (0, spare)),
            "down_sums": down.float().sum(1),
            "score": F.pad(parts.out.weight.detach()[0].float(), (0, spare)),
        }
        for name in fused_dynamic.PredictorWeights._fields:
            self.register_buffer(name, tensors[name], persistent=False)

    def forward(
        self, x: Tensor, stats: Tensor | None, sizes: list[Tensor], n: int, prefix: int
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        index = torch.ops.slimvit.predicted_tokens(
            x,
            stats,
            [self._buffers[name] for name in fused_dynamic.PredictorWeights._fields],
            n,
            prefix,
            self.activation,
            self.eps,
            self.block.tf32,
            self.block.backend,
        )
        x, stats = self.block(x, index, stats, **_known(sizes))
        return x, stats, [size.gather(1, index) for size in sizes], index


def _known(sizes: list[Tensor]) -> dict[str, Tensor]:
    """What a block is told of tokens that stand for several."""
    return {"key_bias": sizes[1], "spread": sizes[2]} if sizes else {}


class FusedDynamicNetwork(FusedNetwork):
    """A network up to its final norm whose blocks choose their tokens for each image.

    Args:
        parts: the dense network; weights are copied.
        counts: n_1 … n_L, tokens that each block keeps.
        choosers: how each block chooses, or a selector ahead of it; None where it has nothing to
            choose, and keeps the first.
        dtype: what it computes in: float16 or bfloat16, accumulated in float32, or float32.
        tf32: whether float32 products may be in TF32.
        backend: whose kernels, "triton" or "cuda".
    """

    def __init__(
        self,
        parts: NetworkParts,
        counts: Sequence[int],
        choosers: Sequence[ChooserParts | None],
        dtype: torch.dtype,
        tf32: bool = False,
        backend: str = "triton",
    ) -> None:
        super().__init__(parts._replace(counts=tuple(counts)), dtype, tf32, backend)
        for layer, chooser in enumerate(choosers):
            block = self.blocks[layer]
            if isinstance(chooser, AbsorbParts):
                self.blocks[layer] = _Absorbing(chooser, block, parts.blocks[layer].norm1)
            elif isinstance(chooser, PredictorParts):
                self.blocks[layer] = _Predicting(chooser, block, dtype)
            elif isinstance(chooser, SelectorParts):
                self.blocks[layer] = Selecting(chooser, block, dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Kept tokens after the final norm, [B, n_L, D], each image's own."""
        return self._run(images)[0]

    def with_places(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The same, and where the tokens that each block keeps stand: L of [B, n], int64.

        The package of the k-th selector, from 0, stands at N + k.
        """
        x, kept = self._run(images)
        place = self.order.expand(x.shape[0], -1)
        places = []
        for block, which in zip(self.blocks, kept):
            if isinstance(block, Selecting):
                place = F.pad(place, (0, 1), value=len(self.order) + block.packages)
            place = place[:, :which] if isinstance(which, int) else place.gather(1, which)
            places.append(place)
        return x, places

    def _run(self, images: Tensor) -> tuple[Tensor, list[Tensor | int]]:
        x, stats = self.embed(images)
        sizes: list[Tensor] = []  # see `absorb_block`; none while all are one
        kept: list[Tensor | int] = []
        for block, n in zip(self.blocks, self.counts):
            which: Tensor | int = n
            if isinstance(block, FusedBlock):
                x, stats = block(x, n, stats, **_known(sizes))
                sizes = [size[:, :n].contiguous() for size in sizes]
            else:
                x, stats, sizes, which = block(x, stats, sizes, n, self.prefix)
            kept.append(which)
        return self.norm(x).to(self.dtype), kept
