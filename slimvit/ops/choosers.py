"""How a block chooses its tokens, as compiled kernels read it, whatever planner it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from slimvit.backends.cuda_choosing import MOST_TOKENS, WIDEST_MERGE
from slimvit.backends.fused_selector import WIDEST_SELECTOR
from slimvit.ops.modules import activation_name, layer_norm_of

REACH = 3
"""Patches that absorb looks at for each that goes, those of least importance."""


def candidates(m: int, n: int, prefix: int) -> int:
    """How many patches absorb looks at when n of m tokens are kept, the first `prefix` always."""
    return min(m - prefix, REACH * (m - n))


class Threshold(NamedTuple):
    """Patches of lower scores go, as many as there are of each image, instead of a fixed number.

    Attributes:
        value: what scores are compared with where importance adds up to one, > 0.
        before: tokens that reach the block of an average image, and
        after: that it keeps of one.
    """

    value: float
    before: int
    after: int

    def candidates(self, m: int, prefix: int) -> int:
        """How many of m tokens may go: as if the same share did as on average, but never all."""
        n = m * self.after // self.before
        return min(candidates(m, n, prefix), m - prefix - 1)


class AbsorbParts(NamedTuple):
    """Tokens that are attended to and that no other stands for are kept, the others go into them.

        importance_i = Σ_h A^h[head tokens, i] · ‖V^h_i‖
        score_i = sqrt(importance_i) · (1 − max cos(y_i, y_j)),  j ahead of i in importance
        y = LN1(x)

    Only the `candidates` may be pruned; `slimvit.Absorb` says the whole rule.

    Attributes:
        head_tokens: leading tokens that the head reads.
        threshold: for a number of each image's own; None for the block's.
    """

    head_tokens: int
    threshold: Threshold | None = None


class PredictorParts(NamedTuple):
    """The tokens of the highest predicted scores are kept: score = out(act(down(norm(x)))).

    Attributes:
        norm: of D channels.
        down: D to r channels.
        act: the activation.
        out: r channels to one score, of which only the order counts.
    """

    norm: nn.LayerNorm
    down: nn.Linear
    act: nn.Module
    out: nn.Linear


class SelectorParts(NamedTuple):
    """Ahead of the block a selector keeps some patches and makes a package of the others.

        kept = the patches of the highest keep_i − prune_i
        package = Σ_pruned P_i x_i / Σ_pruned P_i,  P_i = softmax(keep_i, prune_i)[0]

    The block receives prefix tokens, kept patches, the packages of earlier selectors and the new
    one, in that order, and keeps them all.

    Attributes:
        selector: of logits (keep, prune), [B, p, 2], of patches [p, B, D]; its attributes are those
            of `slimvit.dynamic.selector.Selector`.
        patches: how many to keep; None for as many as it favours, at least `fewest` and not all.
        packages: package tokens of earlier selectors.
        fewest: one, and one more for each selector after it, which has to keep one and prune one.
    """

    selector: nn.Module
    patches: int | None
    packages: int
    fewest: int = 1


ChooserParts = AbsorbParts | PredictorParts | SelectorParts


def why_not_chosen(
    choosers: Sequence[ChooserParts | None],
    backend: str,
    alive: Sequence[int] = (),
    width: int = 0,
) -> str | None:
    """Why the kernels of a back end do not choose tokens like this, or None if they do.

    Args:
        choosers: of each block.
        backend: "cpu", "triton" or "cuda".
        alive: how many tokens reach each block; where it is empty no size is asked.
        width: the model's, D.
    """
    kinds = {type(parts) for parts in choosers}
    if {AbsorbParts, SelectorParts} <= kinds:
        return "a selector stands among blocks that absorb tokens"
    for number, parts in enumerate(choosers, 1):
        reason = None
        if isinstance(parts, AbsorbParts) and parts.threshold is not None and backend != "cpu":
            reason = "it keeps as many patches as reach its threshold, not a fixed number"
        elif isinstance(parts, PredictorParts):
            reason = _why_not(parts, backend)
        elif isinstance(parts, SelectorParts):
            reason = _why_no_selector(parts, backend)
        if reason is None and backend == "cuda" and parts is not None and alive:
            reason = _too_large(parts, alive[number - 1], width)
        if reason is not None:
            return f"block {number}: {reason}"
    return None


def _too_large(parts: ChooserParts, tokens: int, width: int) -> str | None:
    """What an image's scores, or a merged row, have no room for on chip."""
    if tokens > MOST_TOKENS:
        return f"it chooses among at most {MOST_TOKENS} tokens, got {tokens}"
    if isinstance(parts, AbsorbParts) and width > WIDEST_MERGE:
        return f"it absorbs tokens of at most {WIDEST_MERGE} channels, got {width}"
    return None


def _why_not(parts: PredictorParts, backend: str) -> str | None:
    if layer_norm_of(parts.norm) is None:
        return f"its predictor's norm is {type(parts.norm).__name__}, not LayerNorm with weights"
    if activation_name(parts.act) is None:
        return f"its predictor's activation is {type(parts.act).__name__}, not GELU or QuickGELU"
    if backend == "cpu" and parts.down.out_features % 16:
        return f"its predictor's channels must be a multiple of 16, got {parts.down.out_features}"
    return None


def _why_no_selector(parts: SelectorParts, backend: str) -> str | None:
    channels = parts.selector.norm_weight.shape[-1]
    if backend == "cpu":
        if channels % 16:
            return f"the channels of its selector's heads must be a multiple of 16, got {channels}"
        return None
    if parts.patches is None:
        return "its selector keeps as many patches as it favours, not a fixed number"
    if channels > WIDEST_SELECTOR:
        return f"its selector's heads must have at most {WIDEST_SELECTOR} channels, got {channels}"
    return None
