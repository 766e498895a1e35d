"""Multiply–accumulates (what the papers print as "FLOPs"), counted from shapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from slimvit.masks import Masks
from slimvit.models.spec import Spec


class Plan(Protocol):
    """A dynamic plan, bound to a model, as far as its work is counted."""

    counts: tuple[int, ...]
    semantics: str

    @property
    def tokens(self) -> int:
        """N, all tokens of the model."""

    @property
    def alive(self) -> tuple[int, ...]:
        """Tokens whose keys and values each block computes."""

    @property
    def ragged(self) -> bool:
        """Whether each image keeps a number of tokens of its own, about the counts."""

    def macs(self, spec: Spec) -> int:
        """Multiply–accumulates of choosing, for one image."""

    def with_counts(self, counts: Sequence[int]) -> Plan:
        """The plan as it runs on an image of which it keeps so many."""


def gmacs(spec: Spec, masks: Masks | Plan | None = None) -> float:
    """Executed giga-MACs for one image: what the slimmed model computes, no more.

    What a plan's choosing costs is counted as the kernels do it; plain PyTorch may compute more to
    choose, as absorb there compares every patch with every other.

    With n kept and m alive tokens, a block costs n·D·Hd for the queries, 2·m·D·Hd for keys and
    values, 2·n·m·Hd for attention, n·Hd·D for its projection and n times the MLP. Embedding and
    head are included; norms, softmax and activations, as usual, are not. In `drop`, m is n_{l-1};
    in `zero` one more key where tokens are dead; in `idle` always N.

    Args:
        spec: the model's shape.
        masks: kept sets, or a bound dynamic plan, whose own work counts too; None counts the
            dense model.
    """
    rows = zip(*_rows(spec, masks), strict=True)
    blocks = sum(block_macs(spec, n, m, keys) for n, m, keys in rows)
    planner = 0 if masks is None or isinstance(masks, Masks) else masks.macs(spec)
    return (blocks + _ends(spec) + planner) / 1e9


def paper_gmacs(spec: Spec, masks: Masks | Plan | None = None) -> float:
    """Giga-MACs by the papers' formula: every matrix of block l counted with n_l rows.

    It leaves out that keys and values are computed for the alive tokens, n_{l-1} of them.

    Source: Patch Slimming (Tang et al., CVPR 2022), section 3.
    """
    counts, _, _ = _rows(spec, masks)
    return (sum(block_macs(spec, n, n, n) for n in counts) + _ends(spec)) / 1e9


def cut(spec: Spec, masks: Masks | Plan) -> float:
    """Fraction of the dense model's MACs that the masks save: 1 - gmacs(masks) / gmacs(dense)."""
    return 1 - gmacs(spec, masks) / gmacs(spec)


def image_gmacs(spec: Spec, plan: Plan, kept: Sequence[Tensor]) -> Tensor:
    """Executed giga-MACs of each image, where each keeps a number of tokens of its own.

    Args:
        spec: the model's shape.
        plan: a bound dynamic plan.
        kept: places that each block keeps, L of [B, n_l]; -1 where an image keeps fewer.

    Returns:
        [B], float64.
    """
    counts = torch.stack([(places >= 0).sum(1) for places in kept], 1).tolist()
    values = [gmacs(spec, plan.with_counts(own)) for own in counts]
    return torch.tensor(values, dtype=torch.float64)


@torch.inference_mode()
def mean_gmacs(spec: Spec, plan: Masks | Plan, slim: nn.Module, batches: Iterable[Tensor]) -> float:
    """Executed giga-MACs for an image, on average over images where they differ.

    Args:
        spec: the model's shape.
        plan: kept sets, or a bound dynamic plan.
        slim: the model that it makes, whose `kept_sets` are asked for if it is ragged.
        batches: images [B, C, H, W], or tuples that begin with them.
    """
    if isinstance(plan, Masks) or not plan.ragged:
        return gmacs(spec, plan)
    device = next(itertools.chain(slim.parameters(), slim.buffers())).device
    found = []
    for batch in batches:
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        found.append(image_gmacs(spec, plan, slim.kept_sets(images.to(device))))
    return float(torch.cat(found).mean())


def _rows(spec: Spec, masks: Masks | Plan | None) -> tuple[list[int], list[int], list[int]]:
    """For each block: rows kept, rows whose key and value it computes, keys it attends to."""
    if masks is None:
        full = [spec.tokens] * spec.depth
        return full, full, full
    alive = list(masks.alive)
    if masks.semantics == "idle":
        alive = [spec.tokens] * spec.depth
    keys = alive
    if masks.semantics == "zero":
        keys = [m + (m < spec.tokens) for m in alive]
    return list(masks.counts), alive, keys


def block_macs(spec: Spec, n: int, m: int, keys: int) -> int:
    """Of one block: n kept tokens, m whose keys and values it computes, keys that it attends to."""
    inner = spec.heads * spec.head_dim
    projections = n * spec.width * inner * (3 if spec.gated else 2) + 2 * m * spec.width * inner
    return projections + 2 * n * keys * inner + n * spec.mlp_macs


def _ends(spec: Spec) -> int:
    area = spec.patch_size[0] * spec.patch_size[1]
    embedding = spec.patches * spec.in_chans * area * spec.width
    return embedding + spec.head_tokens * spec.width * spec.num_classes
