"""Algorithm 1 of Patch Slimming: top-down, block by block, the fewest tokens within a tolerance."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from slimvit import models
from slimvit.models import Spec
from slimvit.search.features import Features
from slimvit.search.layer import Layer, score_layer
from slimvit.search.scores import Score
from slimvit.search.tune import BlockTuner


@dataclass(frozen=True)
class Settings:
    """How to search. Two searches with the same settings, model and images end alike.

    Attributes:
        score: rates the tokens of a block.
        tolerance: largest relative error of the block above; unused with `counts`.
        counts: fixed kept counts n_1 … n_L instead of a tolerance.
        granularity: tokens added per step, r'; the last step is then bisected.
        epochs: of block fine-tuning per step; 0 leaves the weights alone.
        lr: learning rate of block fine-tuning.
        semantics: what a pruned token is to later blocks.
        seed: of shuffling and of the random score.
    """

    score: Score
    tolerance: float | None
    counts: tuple[int, ...] | None
    granularity: int
    epochs: int
    lr: float
    semantics: str
    seed: int


@dataclass
class Found:
    """What is known of one block: its kept set, and how it was found.

    Attributes:
        layer: t.
        keep: bool [N].
        scores: float32 [N].
        error: the relative error reached.
        steps: candidate sets tried.
        seconds: spent.
        weights: of the fine-tuned block by name, empty if it was left alone.
    """

    layer: int
    keep: Tensor
    scores: Tensor
    error: float
    steps: int
    seconds: float
    weights: dict[str, Tensor] = field(default_factory=dict)


def run(
    model: nn.Module,
    features: Features,
    settings: Settings,
    done: Sequence[Found],
    finished: Callable[[Found], None],
) -> Iterator[Found]:
    """Yield the blocks L … 1 as they are found.

    Args:
        model: the dense model.
        features: its features on the calibration images.
        settings: how to search.
        done: blocks found by an earlier run of the same search, L first; they are yielded as they
            are, and only the scores' recursion is run again.
        finished: called with each newly found block before it is yielded.

    Source: Patch Slimming (Tang et al., CVPR 2022), Algorithm 1.
    """
    spec = models.spec(model)
    if len(done) == spec.depth:
        yield from done
        return
    dense = models.block_parts(model)
    tuned = copy.deepcopy(model).requires_grad_(False)
    running = models.block_parts(tuned)
    found = done[0] if done else _last(spec)
    if not done:
        finished(found)
    yield found
    for index in range(spec.depth - 1, 0, -1):
        kept = found.keep.nonzero().squeeze(1)
        start = time.perf_counter()
        options = {"tokens": spec.tokens, "seed": settings.seed}
        scores = score_layer(features, index, dense, kept, settings.score, **options)
        module = models.block_module(tuned, index)
        position = spec.depth - index
        if position < len(done):
            found = done[position]
            if found.weights:
                module.load_state_dict(found.weights)
        else:
            layer = Layer(
                index=index,
                dense=dense[index - 1],
                block=running[index - 1],
                above=running[index],
                order=_order(kept, scores, spec),
                above_count=len(kept),
                semantics=settings.semantics,
            )
            n, error, steps = _find(layer, features, settings, module, spec)
            keep = torch.zeros(spec.tokens, dtype=torch.bool)
            keep[layer.order[:n]] = True
            weights = copy.deepcopy(module.state_dict()) if layer.tuned else {}
            seconds = time.perf_counter() - start
            found = Found(index, keep, scores.float(), error, steps, seconds, weights)
            finished(found)
        yield found


def _last(spec: Spec) -> Found:
    """S_L: what the head reads. A block that computes nothing else is lossless."""
    keep = torch.arange(spec.tokens) < spec.head_tokens
    return Found(spec.depth, keep, keep.float() / spec.head_tokens, 0.0, 0, 0.0)


def _order(kept: Tensor, scores: Tensor, spec: Spec) -> Tensor:
    """S_{t+1}, then the other prefix tokens, then the rest from the best score down."""
    rating = scores.clone()
    rating[: spec.prefix] = 2.0  # scores of one image sum to 1
    rating[kept] = 3.0
    return torch.argsort(rating, descending=True, stable=True)


def _find(
    layer: Layer, features: Features, settings: Settings, module: nn.Module, spec: Spec
) -> tuple[int, float, int]:
    """The smallest tried n within the tolerance, its error, and how many were tried."""
    if settings.counts is not None:
        first = last = settings.counts[layer.index - 1]
    else:
        first, last = max(layer.above_count, spec.prefix), spec.tokens
    tuner = None
    if settings.epochs:
        module.requires_grad_(True)
        tuner = BlockTuner(layer, module.parameters(), lr=settings.lr, seed=settings.seed)
    steps = 0
    for n in [*range(first, last, settings.granularity), last]:
        steps += 1
        error = layer.error(features, n)
        if tuner is not None and not _within(error, settings):
            tuner.epochs(features, n, settings.epochs)
            error = layer.error(features, n)
        if _within(error, settings):
            break
    module.requires_grad_(False)
    if n > first and _within(error, settings):
        return _refine(
            layer, features, settings, max(first, n - settings.granularity), n, error, steps
        )
    return n, error, steps


def _refine(
    layer: Layer,
    features: Features,
    settings: Settings,
    outside: int,
    inside: int,
    error: float,
    steps: int,
) -> tuple[int, float, int]:
    """Bisect the last step, so that the granularity costs time and not tokens."""
    while inside - outside > 1:
        middle = (outside + inside) // 2
        tried = layer.error(features, middle)
        steps += 1
        if _within(tried, settings):
            inside, error = middle, tried
        else:
            outside = middle
    return inside, error, steps


def _within(error: float, settings: Settings) -> bool:
    return settings.tolerance is not None and error <= settings.tolerance
