"""absorb: without any training, tokens that matter little go into the kept ones like them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimvit.dynamic.planner import Planner
from slimvit.dynamic.schedule import check_cut, counts_for_cut
from slimvit.models import Spec
from slimvit.ops import AbsorbParts, Choice, View, complement, rows_of, top

_LEAST = 1e-20  # importance: an average needs a weight


class Absorb(Planner):
    """Each pruned token is averaged into the kept token most like it; nothing is trained.

    Of each image the tokens are kept that the class token reads and that no other stands for:

        importance_i = Σ_h A^h[class, i] · ‖V^h_i‖
        score_i = importance_i · (1 − max cos(y_i, y_j)),  j ahead of i in importance,  y = LN1(x)

    A pruned token goes into the kept patch of the greatest cosine, which becomes the average of
    both, weighted by importance, of their average length; it counts for √cos of its size more.

    Args:
        cut: share of the dense model's multiply–accumulates to save, in (0, 1); or
        counts: n_1 … n_L, tokens that each block keeps, prefix tokens included.

    Raises:
        PlanError: neither or both are given, or they are out of range.
    """

    kind = "absorb"

    def __init__(self, cut: float | None = None, *, counts: Sequence[int] | None = None) -> None:
        super().__init__(counts)
        check_cut(cut, counts)
        self.cut = cut

    def choose(self, layer: int, view: View, n: int) -> Choice:
        """The n tokens of the highest scores; the others go into them."""
        prefix, m = view.prefix, view.alive.x.shape[0]
        importance = (view.class_attention() * view.values.float().norm(dim=-1)).sum(1)  # [B, m]
        y = F.normalize(view.y.transpose(0, 1).float(), dim=-1)  # [B, m, D]
        cosine = y @ y.transpose(1, 2)
        patch = torch.arange(m, device=y.device) >= prefix  # nothing goes into a prefix token
        cosine = torch.where(patch, cosine, -1.0)
        score = importance * (1 - _nearest_above(cosine, importance))
        index = top(score, n, prefix)
        rows = rows_of(cosine, complement(index, m)).transpose(1, 2)  # [B, m, m - n]
        nearest = rows_of(rows, index).max(1)
        gain = view.size.gather(1, complement(index, m)) * nearest.values.clamp(min=0).sqrt()
        return Choice(index, nearest.indices, importance.clamp(min=_LEAST), gain)

    def parts(self, layer: int) -> AbsorbParts | None:
        """What kernels need; None for a subclass that chooses in another way."""
        if type(self).choose is not Absorb.choose:
            return None
        return AbsorbParts(self._bound.head_tokens)

    def counts_for(self, spec: Spec) -> tuple[int, ...]:
        """The counts, or the schedule that saves `cut`."""
        if self.counts is not None:
            return self.counts
        return counts_for_cut(spec, self.cut, lambda counts: Absorb(counts=counts))

    def settings(self) -> dict[str, Any]:
        """The cut, or the counts."""
        return {"cut": self.cut} if self.counts is None else super().settings()

    def macs(self, spec: Spec) -> int:
        """Class attention, and the cosine of every pair, in each block that prunes."""
        return sum(
            m * spec.heads * spec.head_dim * spec.head_tokens + m * (m - 1) // 2 * spec.width
            for m, n in zip(self.alive, self.counts)
            if spec.prefix < n < m
        )


def _nearest_above(cosine: Tensor, importance: Tensor) -> Tensor:
    """Greatest cosine of each token [B, m] to one ahead of it in importance; -1 for the first.

    Among equals the earlier is ahead, so that of two alike one stands for the other.
    """
    theirs, mine = importance[:, None, :], importance[:, :, None]
    position = torch.arange(importance.shape[1], device=importance.device)
    earlier = position < position[:, None]
    above = (theirs > mine) | ((theirs == mine) & earlier)
    return cosine.masked_fill(~above, -1.0).amax(2)
