"""The tensors that fused GPU kernels compute with, and the shapes that they must have."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from slimvit.backends.fused_checks import require, require_tensor

_Weights = TypeVar("_Weights", bound=tuple)


class BlockWeights(NamedTuple):
    """The tensors of one block, in the order in which an op takes them.

    Norms are folded: weights times the norm's weight, biases plus the weight times the norm's bias.
    Matrices have the dtype that the block computes in, everything else is float32.

    Attributes:
        qkv: [3·H·d, D].
        qkv_bias: [3·H·d].
        qkv_sums: sums of the rows of `qkv`, as rounded.
        proj: [D, H·d].
        proj_bias: [D].
        fc1: [hidden, D].
        fc1_bias: [hidden].
        fc1_sums: sums of the rows of `fc1`, as rounded.
        fc2: [D, hidden].
        fc2_bias: [D].
        keys: for a block that keeps one or two tokens, the key projection of each head turned over,
            [H·D, d]; else an empty tensor.
        fc1_squares: sums of the squares of the rows of `fc1`, as rounded, [hidden].
    """

    qkv: Tensor
    qkv_bias: Tensor
    qkv_sums: Tensor
    proj: Tensor
    proj_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc1_sums: Tensor
    fc2: Tensor
    fc2_bias: Tensor
    keys: Tensor
    fc1_squares: Tensor


class PredictorWeights(NamedTuple):
    """The tensors of a score predictor, its norm folded, in the order in which an op takes them.

    Attributes:
        down: [r, D], in the dtype that the block computes in; r a multiple of 16.
        down_bias: [r], float32.
        down_sums: sums of the rows of `down`, as rounded, float32.
        score: [r], float32.
    """

    down: Tensor
    down_bias: Tensor
    down_sums: Tensor
    score: Tensor


class SelectorWeights(NamedTuple):
    """The tensors of a selector with H heads of c channels, in the order in which an op takes them.

    Matrices that multiply the patches' own rows have the dtype of the tokens, all else is float32.
    Matrices of heads have inputs before outputs.

    Attributes:
        embed: [H, c, c], the norm's weight in it; its first (c + 1) // 2 outputs are local.
        embed_bias: [H, c], the norm's bias in it.
        judge1: [H, c, c2].
        bias1: [H, c2].
        judge2: [H, c2, c4].
        bias2: [H, c4].
        judge3: [H, c4]: the column that keeps less the one that prunes, for only that difference
            counts.
        bias3: [H], likewise.
        weigh1: [r, H].
        weigh1_bias: [r].
        weigh2: [H, r].
        weigh2_bias: [H].
    """

    embed: Tensor
    embed_bias: Tensor
    judge1: Tensor
    bias1: Tensor
    judge2: Tensor
    bias2: Tensor
    judge3: Tensor
    bias3: Tensor
    weigh1: Tensor
    weigh1_bias: Tensor
    weigh2: Tensor
    weigh2_bias: Tensor


def block_weights(backend: str, weights: list[Tensor], heads: int) -> BlockWeights:
    """The weights of a block with so many heads, once their shapes fit each other."""
    part = _named(backend, BlockWeights, weights)
    _require_dims(backend, part, 2, "qkv", "proj", "fc1")
    width, inner, hidden = part.qkv.shape[1], part.proj.shape[1], part.fc1.shape[0]
    rule = f"heads must divide the {inner} channels of all heads"
    require(backend, heads > 0 and inner % heads == 0, rule, heads)
    keys = (heads * width, inner // heads) if part.keys.numel() else (0,)
    shapes = (
        *((3 * inner, width), (3 * inner,), (3 * inner,), (width, inner), (width,)),
        *((hidden, width), (hidden,), (hidden,), (width, hidden), (width,), keys, (hidden,)),
    )
    _require_shapes(backend, part, shapes, ("qkv", "proj", "fc1", "fc2", "keys"))
    return part


def predictor_weights(backend: str, weights: list[Tensor]) -> PredictorWeights:
    """The weights of a predictor, once their shapes fit each other."""
    part = _named(backend, PredictorWeights, weights)
    _require_dims(backend, part, 2, "down")
    channels = len(part.down)
    shapes = (tuple(part.down.shape), (channels,), (channels,), (channels,))
    _require_shapes(backend, part, shapes, ("down",))
    return part


def selector_weights(backend: str, weights: list[Tensor]) -> SelectorWeights:
    """The weights of a selector, once their shapes fit each other."""
    part = _named(backend, SelectorWeights, weights)
    _require_dims(backend, part, 3, "embed", "judge1", "judge2")
    _require_dims(backend, part, 2, "weigh1")
    (heads, c, _), half, quarter = part.embed.shape, part.judge1.shape[2], part.judge2.shape[2]
    hidden = len(part.weigh1)
    shapes = (
        *((heads, c, c), (heads, c), (heads, c, half), (heads, half), (heads, half, quarter)),
        *((heads, quarter), (heads, quarter), (heads,)),
        *((hidden, heads), (hidden,), (heads, hidden), (heads,)),
    )
    _require_shapes(backend, part, shapes, ("embed", "judge1", "judge2"))
    return part


def _named(backend: str, kind: type[_Weights], weights: list[Tensor]) -> _Weights:
    names = kind._fields
    rule = f"weights must be {len(names)} tensors, {', '.join(names)}"
    require(backend, len(weights) == len(names), rule, len(weights))
    return kind(*weights)


def _require_dims(backend: str, part: tuple, dims: int, *names: str) -> None:
    for name in names:
        tensor, rule = getattr(part, name), f"{name} of the weights must have {dims} dimensions"
        require(backend, tensor.dim() == dims, rule, tensor)


def _require_shapes(
    backend: str, part: tuple, shapes: tuple[tuple[int, ...], ...], narrow: tuple[str, ...]
) -> None:
    """Tensors of these shapes on one device, the `narrow` of the first's dtype, others float32."""
    dtype, device = part[0].dtype, part[0].device
    for name, tensor, shape in zip(part._fields, part, shapes, strict=True):
        kind = dtype if name in narrow else torch.float32
        require_tensor(backend, f"{name} of the weights", tensor, shape, kind, device)
