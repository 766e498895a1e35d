"""Cases and references of the choice of the highest scores, for the kernels of every back end."""

import math

import torch
from kernel_checks import (
    Random,
)
from torch import Tensor


def chosen(scores: Tensor, n: int, prefix: int) -> list[list[int]]:
    """By sorting."""
    rows = []
    for row in scores.tolist():
        row = [-math.inf if math.isnan(score) else score for score in row]
        order = sorted(range(prefix, len(row)), key=lambda i: -row[i])
        rows.append(sorted([*range(prefix), *order[: n - prefix]]))
    return rows


def received(cosine: Tensor, index: list[list[int]], prefix: int) -> list[list[int]]:
    """Which of the kept each token goes into, token by token."""
    rows = []
    for image, kept in zip(cosine.nan_to_num(-3).tolist(), index, strict=True):
        places = range(prefix, len(kept))
        rows.append(
            [
                kept.index(i) if i in kept else max(places, key=lambda k: row[kept[k]])
                for i, row in enumerate(image)
            ]
        )
    return rows


def hard_scores(batch: int, m: int, kind: str) -> Tensor:
    scores = Random(m)(batch, m)
    if kind == "ties":
        scores = (2 * scores).round() / 2  # both zeros among them
    elif kind == "nan":
        scores[:, ::3] = math.nan
        scores[:, 1::5] = -math.inf
        scores[:, 2::7] = math.inf
    elif kind == "equal":
        scores = torch.zeros_like(scores)
    elif kind == "tiny":
        scores = scores * 1e-41  # denormal
    return scores


CHOICES = [
    (1, 2, 2, 1),
    (3, 5, 3, 2),
    (3, 17, 6, 5),
    (1, 63, 62, 1),
    (3, 197, 150, 2),
    (1, 257, 30, 5),
    (1, 577, 300, 1),
    (1, 1025, 800, 1),
]


def check_select(select, kind, batch, m, n, prefix):
    """A back end's `absorb_select` against loops, on scores and cosines that make it hard."""
    scores, random = hard_scores(batch, m, kind), Random(m + 1)
    cosine = random(batch, m, m).tanh()
    if kind == "ties":
        cosine = (3 * cosine).round() / 3
    if kind == "nan":
        cosine[:, :, ::4] = math.nan
        cosine[:, 1] = math.nan
    index, into = select(scores, cosine, n, prefix)
    kept = chosen(scores, n, prefix)
    assert (index.dtype, into.dtype) == (torch.int64, torch.int32)
    assert index.tolist() == kept
    assert into.tolist() == received(cosine, kept, prefix)
