"""absorb: without any training, tokens that matter little go into the kept ones like them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimvit.checks import number, numbers
from slimvit.dynamic.planner import Planner, overrides
from slimvit.dynamic.schedule import counts_for_cut
from slimvit.errors import PlanError
from slimvit.models import Spec
from slimvit.ops import AbsorbParts, Choice, Threshold, View, candidates, complement, rows_of, top

_LEAST = 1e-20  # importance: an average needs a weight
_LEAST_READ = 2.4e-38  # attention: kernels hold less for none
_RULE = ("choose", "before", "count", "threshold", "_looked_at", "_scores")


class Absorb(Planner):
    """Each pruned token is averaged into the kept token most like it; nothing is trained.

    Of each image the tokens are kept that the class token reads and that no other stands for:

        importance_i = Σ_h A^h[class, i] · ‖V^h_i‖
        score_i = sqrt(importance_i) · (1 − max cos(y_i, y_j)),  j ahead of i in importance
        y = LN1(x),  A below 2.4e-38 counted as 0

    The lowest scores go, of the patches of least importance: three of them are candidates for each
    that goes, since a score of the others would hardly be low. A pruned token goes into the kept
    patch ahead of it of the greatest cosine, which becomes the average of both, weighted by
    importance, stands for as many tokens as both, and remembers how far they were from it: its
    spread, by which norms and activations answer as for the mean of its members, not for their
    mean alone; see `slimvit.ops.spread`.

    With thresholds each image keeps a number of its own, and the counts are those of an average
    image. In block l, of the candidates, all go for which

        score_i < threshold_l · sqrt(Σ_j importance_j)

    `slimvit.search.fit_thresholds` finds them. In training the counts hold for every image.

    Args:
        cut: share of the dense model's multiply–accumulates to save, in (0, 1); or
        counts: n_1 … n_L, tokens that each block keeps, prefix tokens included.
        thresholds: one for each block, ≥ 0; those of blocks that need not choose are not looked at.

    Raises:
        PlanError: neither or both of `cut` and `counts` are given, or something is out of range.
    """

    kind = "absorb"

    def __init__(
        self,
        cut: float | None = None,
        *,
        counts: Sequence[int] | None = None,
        thresholds: Sequence[float] | None = None,
    ) -> None:
        super().__init__(counts)
        if (cut is None) == (counts is None):
            raise PlanError("give one of cut and counts")
        self.cut = None if cut is None else number("cut", cut, above=0, below=1, error=PlanError)
        self.thresholds = (
            None
            if thresholds is None
            else numbers("thresholds", thresholds, least=0, error=PlanError)
        )

    def bind(self, spec: Spec) -> Absorb:
        """A copy for a model of this shape."""
        bound = super().bind(spec)
        if self.thresholds is not None:
            _check_average(bound.counts, len(self.thresholds), spec)
        bound._average = tuple(zip(bound.alive, bound.counts, strict=True))
        return bound

    @property
    def ragged(self) -> bool:
        """Whether there are thresholds."""
        return self.thresholds is not None

    def count(self, layer: int, received: int) -> int | None:
        """n_l, or with a threshold None: as many as are chosen."""
        if not self.ragged or self.training or self.counts[layer] <= self.prefix:
            return self.counts[layer]
        return received if self.threshold(layer) is None else None

    def _looked_at(self, layer: int, m: int, n: int | None, prefix: int) -> int:
        """How many candidates there are."""
        if n is not None:
            return candidates(m, n, prefix)
        return self.threshold(layer).candidates(m, prefix)

    def threshold(self, layer: int) -> Threshold | None:
        """Block `layer`'s, where it has one and chooses at all."""
        if self.thresholds is None:
            return None
        before, after = self._average[layer]
        value = self.thresholds[layer]
        return Threshold(value, before, after) if self.prefix < after < before else None

    def choose(self, layer: int, view: View, n: int | None) -> Choice:
        """The n tokens of the highest scores; the others go into them.

        None keeps, of one image, all but those below the threshold.
        """
        prefix, m = view.prefix, view.alive.x.shape[0]
        importance, cosine, score = self._scores(layer, view, n)
        if n is None:
            if len(score) > 1:
                raise PlanError(
                    "absorb with thresholds keeps another number of patches of each image: "
                    f"it takes one image a call, got {len(score)}"
                )
            n = m - int((score < self.thresholds[layer] * importance.sum().sqrt()).sum())
        index = top(score, n, prefix)
        rows = rows_of(cosine, complement(index, m)).transpose(1, 2)  # [B, m, m - n]
        return Choice(index, rows_of(rows, index).max(1).indices, importance.clamp(min=_LEAST))

    def candidates_of(self, layer: int, view: View) -> Tensor:
        """Scores of one image's candidates over sqrt(Σ importance), which a threshold is for."""
        importance, _, score = self._scores(layer, view, None)
        return (score / importance.sum(1, keepdim=True).sqrt())[score != torch.inf]

    def _scores(self, layer: int, view: View, n: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Importance [B, m]; cosines with the patches ahead [B, m, m], else -1; candidates' scores.

        Those of other tokens are infinite.
        """
        prefix, m = view.prefix, view.alive.x.shape[0]
        attention = view.class_attention()
        attention = torch.where(attention < _LEAST_READ, 0.0, attention)
        importance = (attention * view.values.float().norm(dim=-1)).sum(1)
        y = F.normalize(view.y.transpose(0, 1).float(), dim=-1)  # [B, m, D]
        ahead = _ahead(importance, prefix)
        cosine = torch.where(ahead, y @ y.transpose(1, 2), -1.0)
        score = importance.sqrt() * (1 - cosine.amax(2))
        candidate = ahead.sum(2) >= m - prefix - self._looked_at(layer, m, n, prefix)
        candidate = candidate & (torch.arange(m, device=score.device) >= prefix)
        return importance, cosine, torch.where(candidate, score, torch.inf)

    def parts(self, layer: int) -> AbsorbParts | None:
        """What kernels need; None for a subclass that chooses in another way."""
        if overrides(self, Absorb, *_RULE):
            return None
        return AbsorbParts(self._bound.head_tokens, self.threshold(layer))

    def counts_for(self, spec: Spec) -> tuple[int, ...]:
        """The counts, or the schedule that saves `cut`."""
        if self.counts is not None:
            return self.counts
        return counts_for_cut(spec, self.cut, lambda counts: Absorb(counts=counts))

    def settings(self) -> dict[str, Any]:
        """The cut, or the counts; and the thresholds."""
        found = {"cut": self.cut} if self.counts is None else super().settings()
        return found | ({"thresholds": list(self.thresholds)} if self.ragged else {})

    def macs(self, spec: Spec) -> int:
        """Class attention, and the candidates' cosines, in each block that prunes."""
        total = 0
        for layer, (m, n) in enumerate(zip(self.alive, self.counts)):
            free = self.threshold(layer) is not None
            if free or spec.prefix < n < m:
                patches = m - spec.prefix
                some = self._looked_at(layer, m, None if free else n, spec.prefix)
                cosines = some * patches - some * (some + 1) // 2
                total += m * spec.heads * spec.head_dim * spec.head_tokens + cosines * spec.width
        return total


def _check_average(counts: Sequence[int], thresholds: int, spec: Spec) -> None:
    """Refuse counts that thresholds cannot be about."""
    if thresholds != spec.depth:
        raise PlanError(f"thresholds must be one for each of {spec.depth} blocks, got {thresholds}")
    if min(counts[:-1], default=spec.tokens) <= spec.prefix or counts[-1] > spec.prefix:
        raise PlanError(
            "with thresholds every block but the last must keep a patch, and the last none, "
            f"got counts {list(counts)} with {spec.prefix} prefix tokens"
        )


def _ahead(importance: Tensor, prefix: int) -> Tensor:
    """Which patches are ahead of each token in importance [B, m]: bool [B, m, m].

    Among equals the earlier is ahead, so that of two alike one stands for the other; NaN is least.
    """
    importance = torch.where(importance.isnan(), -torch.inf, importance)
    theirs, mine = importance[:, None, :], importance[:, :, None]
    position = torch.arange(importance.shape[1], device=importance.device)
    ahead = (theirs > mine) | ((theirs == mine) & (position < position[:, None]))
    return ahead & (position >= prefix)
