"""Multiply–accumulates (what the papers print as "FLOPs"), counted from shapes."""

from __future__ import annotations

from typing import Protocol

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

    def macs(self, spec: Spec) -> int:
        """Multiply–accumulates of choosing, for one image."""


def gmacs(spec: Spec, masks: Masks | Plan | None = None) -> float:
    """Executed giga-MACs for one image: what the slimmed model computes, no more.

    With n kept and m alive tokens, a block costs n·D·Hd for the queries, 2·m·D·Hd for keys and
    values, 2·n·m·Hd for attention, n·Hd·D for its projection and n times the MLP. Embedding and
    head are included; norms, softmax and activations, as usual, are not. In `drop`, m is n_{l-1};
    in `zero` one more key where tokens are dead; in `idle` always N.

    Args:
        spec: the model's shape.
        masks: kept sets, or a bound dynamic plan, whose own work counts too; None counts the
            dense model.
    """
    blocks = sum(_block(spec, n, m, keys) for n, m, keys in zip(*_rows(spec, masks), strict=True))
    planner = 0 if masks is None or isinstance(masks, Masks) else masks.macs(spec)
    return (blocks + _ends(spec) + planner) / 1e9


def paper_gmacs(spec: Spec, masks: Masks | Plan | None = None) -> float:
    """Giga-MACs by the papers' formula: every matrix of block l counted with n_l rows.

    It leaves out that keys and values are computed for the alive tokens, n_{l-1} of them.

    Source: Patch Slimming (Tang et al., CVPR 2022), section 3.
    """
    counts = masks.counts if masks is not None else (spec.tokens,) * spec.depth
    return (sum(_block(spec, n, n, n) for n in counts) + _ends(spec)) / 1e9


def cut(spec: Spec, masks: Masks | Plan) -> float:
    """Fraction of the dense model's MACs that the masks save: 1 - gmacs(masks) / gmacs(dense)."""
    return 1 - gmacs(spec, masks) / gmacs(spec)


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


def _block(spec: Spec, n: int, m: int, keys: int) -> int:
    inner = spec.heads * spec.head_dim
    projections = n * spec.width * inner * (3 if spec.gated else 2) + 2 * m * spec.width * inner
    return projections + 2 * n * keys * inner + n * spec.mlp_macs


def _ends(spec: Spec) -> int:
    area = spec.patch_size[0] * spec.patch_size[1]
    embedding = spec.patches * spec.in_chans * area * spec.width
    return embedding + spec.head_tokens * spec.width * spec.num_classes
