"""One block of the search: its tokens' scores and the error that pruning it causes above."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimvit.errors import SearchError
from slimvit.ops import (
    BlockParts,
    attention_probabilities,
    project_qkv,
    slim_block,
    take,
    zero_key,
)
from slimvit.search.features import Features
from slimvit.search.paths import last_moment, step_moment
from slimvit.search.reduce import ExactMean
from slimvit.search.scores import LayerView, Score, squares


@dataclass
class Layer:
    """Block t with the slimmed block t+1 above it.

    Attributes:
        index: t, from L-1 down to 1.
        dense: parts of block t of the dense model.
        block: parts of block t as it will run, fine-tuned or not.
        above: parts of block t+1 as it will run, frozen.
        order: all tokens, S_{t+1} first: any S_t ⊇ S_{t+1} is a prefix of it. int64 [N].
        above_count: n_{t+1}; S_{t+1} is order[:above_count].
        semantics: of the masks.
        tuned: whether block t differs from the dense one.
    """

    index: int
    dense: BlockParts
    block: BlockParts
    above: BlockParts
    order: Tensor
    above_count: int
    semantics: str
    tuned: bool = False

    def output(self, features: Features, batch: int, n: int) -> Tensor:
        """What block t gives for S_t = order[:n], from the dense Z_{t-1}: [n, b, D].

        An unchanged block gives the rows of the dense Z_t.
        """
        kept = self.order[:n].to(self.block.qkv.weight.device)
        if not self.tuned:
            return take(features.at(self.index, batch), kept)
        return slim_block(features.at(self.index - 1, batch), self.block, kept)

    def relative_error(self, features: Features, batch: int, n: int) -> Tensor:
        """‖diag(m)(Ẑ_{t+1} − Z_{t+1})‖²_F / ‖diag(m) Z_{t+1}‖²_F for S_t = order[:n], [b].

        Of features whose squares overflow it is NaN.

        Source: Patch Slimming (Tang et al., CVPR 2022), Eq. 4, relative to the features' size.
        """
        x = self.output(features, batch, n)
        tokens, dead = len(self.order), len(self.order) - n
        extra = None
        if dead and self.semantics == "zero":
            extra = zero_key(self.above, dead, x)
        if dead and self.semantics == "idle":
            idle = self.order[n:tokens].to(x.device)
            x = torch.cat([x, take(features.at(self.index - 1, batch), idle)])
        y = slim_block(x, self.above, self.above_count, extra_key=extra)
        kept = self.order[: self.above_count].to(x.device)
        target = take(features.at(self.index + 1, batch), kept)
        size = squares(target, (0, 2))
        return squares(y - target, (0, 2)) / size.masked_fill(size.isinf(), torch.nan)

    @torch.no_grad()
    def error(self, features: Features, n: int) -> float:
        """The relative error, averaged over all images of all processes.

        Raises:
            SearchError: the error of an image is NaN.
        """
        total = ExactMean(1)
        for batch in range(features.batches):
            error = self.relative_error(features, batch, n)
            if error.isnan().any():
                raise SearchError(
                    f"the relative error of block {self.index + 1} must be a number, "
                    f"got NaN with {n} tokens kept in block {self.index}"
                )
            total.add(error.clamp(max=64.0)[:, None])  # far beyond use, and fixed point overflows
        return float(total.mean())


def probabilities(features: Features, layer: int, batch: int, block: BlockParts) -> Tensor:
    """P of a block whose input is Z_layer: [b, H, N, N]."""
    y = block.norm1(features.at(layer, batch))
    q, k, _ = project_qkv(block, y, y)
    return attention_probabilities(q, k)


def score_layer(
    features: Features,
    index: int,
    dense: list[BlockParts],
    above_kept: Tensor,
    score: Score,
    *,
    tokens: int,
    seed: int,
) -> Tensor:
    """Mean normalised score of every token of block t, float64 [N]; moves C on to C_t.

    Args:
        features: of the dense model.
        index: t.
        dense: parts of all blocks of the dense model.
        above_kept: positions of S_{t+1}, int64.
        score: the score function.
        tokens: N.
        seed: handed to the score.

    Raises:
        SearchError: a score is no tensor [b, N], not finite, negative, or zero for all tokens.
    """
    total = ExactMean(tokens)
    for batch in range(features.batches):
        total.add(
            score_batch(features, index, batch, dense, above_kept, score, tokens=tokens, seed=seed)
        )
    return total.mean()


@torch.no_grad()
def score_batch(
    features: Features,
    index: int,
    batch: int,
    dense: list[BlockParts],
    above_kept: Tensor,
    score: Score,
    *,
    tokens: int,
    seed: int,
) -> Tensor:
    """Score of every token of block t for each image of a batch; moves C on to C_t.

    Args:
        features: of the dense model.
        index: t.
        batch: its number.
        dense: parts of all blocks of the dense model.
        above_kept: positions of S_{t+1}, int64: [n], or of each image its own, [b, n].
        score: the score function.
        tokens: N.
        seed: handed to the score.

    Returns:
        [b, N], of sum 1 for each image.

    Raises:
        SearchError: the score gives anything else than finite, not negative numbers, [b, N].
    """
    above = probabilities(features, index, batch, dense[index])
    first = index == len(dense) - 1
    moment = last_moment(len(above), tokens, above) if first else features.moment(batch)
    moment = step_moment(moment, above, above_kept.to(above.device))
    features.set_moment(batch, moment)
    view = LayerView(
        layer=index,
        attention=probabilities(features, index - 1, batch, dense[index - 1]),
        inputs=features.at(index - 1, batch).transpose(0, 1).clone(),  # a score may write to it
        paths=moment.diagonal(dim1=1, dim2=2),
        seed=seed,
    )
    return _normalised(score(view), len(above), tokens, index)


def _normalised(values: object, images: int, tokens: int, index: int) -> Tensor:
    """Scores of sum 1 for each image, in float32 or float64."""
    if isinstance(values, Tensor) and (kind := _odd_kind(values)):
        raise SearchError(f"a score must be a dense tensor with values, got a {kind} one")
    if not isinstance(values, Tensor) or tuple(values.shape) != (images, tokens):
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise SearchError(f"a score must be a tensor [b, N] = [{images}, {tokens}], got {got}")
    if values.is_complex():
        raise SearchError(f"a score must be of real numbers, got {values.dtype}")
    wide = values.double()  # in float32 sums of great ones overflow
    sums = wide.sum(1, keepdim=True)
    if not torch.isfinite(sums).all() or (wide < 0).any() or (sums <= 0).any():
        raise SearchError(
            f"scores must be finite, not negative and not all zero, those of block {index} are not"
        )
    return (wide / sums).to(torch.float64 if values.dtype == torch.float64 else torch.float32)


def _odd_kind(values: Tensor) -> str | None:
    """What keeps a tensor from being plain numbers in memory, if anything does."""
    if values.is_nested:
        return "nested"
    if values.layout is not torch.strided:
        return str(values.layout).removeprefix("torch.")
    return "meta" if values.is_meta else None
