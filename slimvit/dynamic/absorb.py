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
from slimvit.ops import AbsorbParts, Choice, View, candidates, complement, rows_of, top

_LEAST = 1e-20  # importance: an average needs a weight


class Absorb(Planner):
    """Each pruned token is averaged into the kept token most like it; nothing is trained.

    Of each image the tokens are kept that the class token reads and that no other stands for:

        importance_i = Σ_h A^h[class, i] · ‖V^h_i‖
        score_i = sqrt(importance_i) · (1 − max cos(y_i, y_j)),  j ahead of i in importance
        y = LN1(x)

    The lowest scores go, of the patches of least importance: three of them are candidates for each
    that goes, since a score of the others would hardly be low. A pruned token goes into the kept
    patch ahead of it of the greatest cosine, which becomes the average of both, weighted by
    importance, stands for as many tokens as both, and remembers how far they were from it: its
    spread, by which norms and activations answer as for the mean of its members, not for their
    mean alone; see `slimvit.ops.spread`.

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
        ahead = _ahead(importance, prefix)
        cosine = torch.where(ahead, y @ y.transpose(1, 2), -1.0)
        score = importance.sqrt() * (1 - cosine.amax(2))
        candidate = ahead.sum(2) >= m - prefix - candidates(m, n, prefix)
        index = top(torch.where(candidate, score, torch.inf), n, prefix)
        rows = rows_of(cosine, complement(index, m)).transpose(1, 2)  # [B, m, m - n]
        return Choice(index, rows_of(rows, index).max(1).indices, importance.clamp(min=_LEAST))

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
        """Class attention, and the candidates' cosines, in each block that prunes."""
        total = 0
        for m, n in zip(self.alive, self.counts):
            if spec.prefix < n < m:
                patches, some = m - spec.prefix, candidates(m, n, spec.prefix)
                cosines = some * patches - some * (some + 1) // 2
                total += m * spec.heads * spec.head_dim * spec.head_tokens + cosines * spec.width
        return total


def _ahead(importance: Tensor, prefix: int) -> Tensor:
    """Which patches are ahead of each token in importance [B, m]: bool [B, m, m].

    Among equals the earlier is ahead, so that of two alike one stands for the other; NaN is least.
    """
    importance = torch.where(importance.isnan(), -torch.inf, importance)
    theirs, mine = importance[:, None, :], importance[:, :, None]
    position = torch.arange(importance.shape[1], device=importance.device)
    ahead = (theirs > mine) | ((theirs == mine) & (position < position[:, None]))
    return ahead & (position >= prefix)
