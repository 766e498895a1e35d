"""DPS: a small module in each block predicts, for each image, which tokens matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from slimvit.checks import whole
from slimvit.dynamic.planner import Planner, overrides
from slimvit.dynamic.seeded import seeded
from slimvit.errors import PlanError
from slimvit.models import Spec
from slimvit.ops import Choice, PredictorParts, View


class Predictor(nn.Module):
    """score_i = w2 · GELU(W1 LN(x_i) + b1) + b2: a token's score from what the block receives.

    Args:
        width: D.
        hidden: r, channels after the downsampling.

    Source: Patch Slimming (Tang et al., CVPR 2022), section 4.4.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.down = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.score = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [B, m] of tokens [m, B, D]; only their order within an image counts."""
        return self.score(self.act(self.down(self.norm(x)))).squeeze(-1).t()


class DPS(Planner):
    """Each block keeps the tokens of the highest predicted scores; `train_dps` fits the predictors.

    A predictor stands in every block that prunes patches. Until they are trained their weights
    are random, the same in every process.

    Args:
        counts: n_1 … n_L, tokens that each block keeps, prefix tokens included: those of static
            masks.
        hidden: r, channels inside the predictors; None for D / 4 rounded to a multiple of 16.

    Raises:
        PlanError: `counts` are no whole numbers, or `hidden` is none above 0.

    Source: Patch Slimming (Tang et al., CVPR 2022), section 4.4.
    """

    kind = "dps"

    def __init__(self, counts: Sequence[int], *, hidden: int | None = None) -> None:
        super().__init__(counts)
        self.hidden = None if hidden is None else whole("hidden", hidden, 1, PlanError)
        self.predictors = nn.ModuleDict()

    def choose(self, layer: int, view: View, n: int) -> Choice:
        """The n tokens of the highest scores."""
        return view.top(self.predictors[str(layer)](view.alive.x), n)

    def parts(self, layer: int) -> PredictorParts | None:
        """What kernels need; None for a subclass that chooses in another way."""
        chosen_otherwise = overrides(self, DPS, "choose", "before", "count")
        if chosen_otherwise or str(layer) not in self.predictors:
            return None
        predictor = self.predictors[str(layer)]
        if type(predictor) is not Predictor:
            return None
        return PredictorParts(predictor.norm, predictor.down, predictor.act, predictor.score)

    def bind(self, spec: Spec) -> DPS:
        """A copy for a model of this shape, with a predictor in each block that prunes."""
        bound = super().bind(spec)
        if not bound.predictors:
            # The same weights wherever the same plan is bound.
            with seeded(0):
                for layer in bound.pruning:
                    bound.predictors[str(layer)] = Predictor(spec.width, bound.channels)
        return bound

    @property
    def pruning(self) -> tuple[int, ...]:
        """Blocks that choose among patches, counted from 0."""
        rows = enumerate(zip(self.alive, self.counts, strict=True))
        return tuple(layer for layer, (m, n) in rows if self.prefix < n < m)

    @property
    def channels(self) -> int:
        """r, once bound."""
        if self.hidden is not None:
            return self.hidden
        return max(1, round(self._bound.width / 64)) * 16

    def settings(self) -> dict[str, Any]:
        """The counts and what the predictors look like."""
        return super().settings() | {"hidden": self.hidden}

    def macs(self, spec: Spec) -> int:
        """The predictors, on every alive token."""
        rows = sum(self.alive[layer] for layer in self.pruning)
        return rows * (spec.width + 1) * self.channels
