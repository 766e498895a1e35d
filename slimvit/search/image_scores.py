"""The search's score of every token for each image on its own, and a plan that goes by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from slimvit import models
from slimvit.dynamic import Planner
from slimvit.errors import PlanError
from slimvit.models import Spec
from slimvit.ops import Choice, View, top
from slimvit.search.features import Features
from slimvit.search.layer import score_batch
from slimvit.search.scores import Score, eq6


def block_scores(
    dense: nn.Module,
    features: Features,
    spec: Spec,
    counts: Sequence[int],
    score: Score,
    seed: int = 0,
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield t = L-1 … 1 and the scores of block t, [b, N] for each batch, of sum 1 an image.

    The kept sets above are each image's own: S_t is S_{t+1} and the best scores of block t.

    Args:
        dense: the model that the features are of.
        features: of the images.
        spec: of the model.
        counts: n_1 … n_L.
        score: the score function.
        seed: handed to the score.
    """
    parts = models.block_parts(dense)
    first = torch.arange(spec.head_tokens, device=parts[0].qkv.weight.device)
    kept = [first.expand(features.size(batch), -1) for batch in range(features.batches)]
    for index in range(spec.depth - 1, 0, -1):
        scores = []
        for batch in range(features.batches):
            values = score_batch(
                features, index, batch, parts, kept[batch], score, tokens=spec.tokens, seed=seed
            )
            favoured = values.scatter(1, kept[batch], torch.inf)
            kept[batch] = top(favoured, counts[index - 1], spec.prefix)
            scores.append(values)
        yield index, scores


class TrueScores(Planner):
    """What `DPS` would do if its predictions were exact: a measure of it, of no use in practice.

    The scores of the images to come are given beforehand:

        plan = TrueScores(counts).bind(spec)
        slim = apply_masks(model, plan)
        slim.plan.look(model, images)
        slim(images)
    """

    scores: Tensor | None = None

    def look(self, dense: nn.Module, images: Tensor, score: Score = eq6) -> None:
        """Compute the scores of images [B, C, H, W] from the dense model, which is not changed."""
        spec = self._bound
        with models.evaluating(dense):
            features = Features(dense, [images], cache_bytes=1 << 40, progress=False)
            try:
                found = dict(block_scores(dense, features, spec, self.counts, score))
            finally:
                features.close()
        self.scores = torch.stack([found[t][0] for t in range(1, spec.depth)])  # [L - 1, B, N]

    def choose(self, layer: int, view: View, n: int) -> Choice:
        """The n tokens of the highest scores."""
        if self.scores is None or self.scores.shape[1] != len(view.alive.place):
            raise PlanError("TrueScores: look at these images first")
        return view.top(self.scores[layer].gather(1, view.alive.place), n)
