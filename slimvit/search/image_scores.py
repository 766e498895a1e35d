"""The search's score of every token for each image on its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from slimvit import models
from slimvit.models import Spec
from slimvit.ops import top
from slimvit.search.features import Features
from slimvit.search.layer import score_batch
from slimvit.search.scores import Score


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
