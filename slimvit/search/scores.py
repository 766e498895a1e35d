"""How much each token of a block matters. A new score is one function here, or any callable.

A score sees one batch of calibration images at block t and returns [b, N], not negative, higher for
tokens that should be kept. It is normalised per image and averaged over the images by the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class LayerView(NamedTuple):
    """What a score may look at, for block t of the dense model.

    Attributes:
        layer: t, from 1 to L-1.
        attention: P_t, softmax attention of block t, [b, H, N, N].
        inputs: Z_{t-1}, what block t receives, [b, N, D].
        paths: Σ over head paths through the slimmed blocks t+1 … L of ‖A_t[:, i]‖², [b, N],
            up to a factor per image.
        seed: of the search.
    """

    layer: int
    attention: Tensor
    inputs: Tensor
    paths: Tensor
    seed: int


def eq6(view: LayerView) -> Tensor:
    """Σ_paths ‖A_t[:, i]‖² · Σ_h ‖U_t^h[i, :]‖² with U_t^h = P_t^h |Z_{t-1}|.

    Source: Patch Slimming (Tang et al., CVPR 2022), Eq. 6.
    """
    u = view.attention @ view.inputs.abs().unsqueeze(1)  # [b, H, N, D]
    return view.paths * squares(u, (1, 3))


def attention(view: LayerView) -> Tensor:
    """Σ_h ‖P_t^h[:, i]‖², the columns of the current block's attention (ablation of the paper)."""
    return squares(view.attention, (1, 2))


def random(view: LayerView) -> Tensor:
    """The same random ranking for every image and block (ablation of the paper)."""
    generator = torch.Generator().manual_seed(view.seed)
    values = torch.rand(view.paths.shape[1], generator=generator, dtype=torch.float32)
    return values.to(view.paths).expand_as(view.paths)


def squares(x: Tensor, dim: tuple[int, int]) -> Tensor:
    """Σ x² over two dimensions, in float32 or better: in float16 the square of 256 is infinite."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(dim)


Score = Callable[[LayerView], Tensor]
SCORES: dict[str, Score] = {"eq6": eq6, "attention": attention, "random": random}
