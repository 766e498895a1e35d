"""No speed without a right answer: every row's logits against the float32 reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimvit.dynamic import Planner
from slimvit.errors import MismatchError
from slimvit.export import image_errors, relative_error

TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest relative error of an image's logits, by the precision that computed them.

PyTorch's own error is 1e-6 in float32 on CPUs (TF32 convolutions on GPUs cost 1e-4), and 1 to 2 %
in bfloat16; a model that keeps the wrong tokens, or all of them, is some 20 % off on the images
that `sample_images` makes.
"""

AGREEMENT = {"float32": 0.95, "float16": 0.85, "bfloat16": 0.85}
"""Smallest share of kept places in which a dynamic plan agrees with the float32 reference.

Rounding turns the order of scores that nearly tie, and a token that one keeps and the other does
not stays another one in all later blocks: PyTorch's own bfloat16 agrees in 91 to 99 % of the
places (SPViT with untrained selectors the least), in float32 in all but a few of ten thousand. A
planner that chooses by other scores agrees in 45 to 65 %.
"""

LOOSER = {"float32": 1.0, "float16": 4.0, "bfloat16": 4.0}
"""A dynamic plan's tolerance for the median image, as a multiple of TOLERANCES.

An image with a few other tokens has other logits, by up to 45 % where a random predictor chooses,
so no bound on the worst image tells right from wrong; the median was 1.2 to 11 % in PyTorch's own
bfloat16. That the tokens are right is for AGREEMENT to tell.
"""


def verify(runtime: str, pruned: bool, precision: str, got: Tensor, wanted: Tensor) -> float:
    """The relative error of `got` [B, classes] to the reference's logits.

    Raises:
        MismatchError: it is beyond the precision's tolerance; the row must not be timed.
    """
    error = relative_error(got.detach().to("cpu", torch.float32), wanted)
    _bound(runtime, pruned, precision, error, TOLERANCES[precision])
    return error


def verify_plan(runtime: str, precision: str, got: Tensor, wanted: Tensor) -> float:
    """The median image's relative error of `got` [B, classes], where a plan chose the tokens.

    Raises:
        MismatchError: it is beyond the precision's tolerance; the row must not be timed.
    """
    error = image_errors(got.detach().to("cpu", torch.float32), wanted).median().item()
    _bound(runtime, True, precision, error, LOOSER[precision] * TOLERANCES[precision])
    return error


def verify_kept(runtime: str, precision: str, shares: Tensor) -> float:
    """The mean of `agreement` over everything compared.

    Raises:
        MismatchError: it is below AGREEMENT; the row must not be timed.
    """
    share = shares.mean().item() if len(shares) else 1.0
    if not share >= AGREEMENT[precision]:
        raise MismatchError(
            f"{runtime} (pruned, {precision}) is not timed: it keeps the tokens of the float32 "
            f"reference in {100 * share:.1f} % of the places, fewer than "
            f"{100 * AGREEMENT[precision]:g} %"
        )
    return share


def agreement(got: Sequence[Tensor], wanted: Sequence[Tensor], plan: Planner) -> Tensor:
    """How far the kept patches of two runs agree: 2 |A ∩ B| / (|A| + |B|) of each choice.

    Args:
        got: places that each block keeps of B images, L of [B, n_l].
        wanted: those of the float32 reference.
        plan: bound; prefix tokens, packages and blocks that keep all patches or none do not count.

    Returns:
        One share an image and block that chooses, [choices].
    """
    patches = range(plan.prefix, plan.tokens)
    shares = [
        _shared(ours.cpu(), theirs.cpu(), patches)
        for ours, theirs in zip(got, wanted, strict=True)
        if plan.prefix < theirs.shape[1] < plan.tokens
    ]
    return torch.cat(shares) if shares else torch.zeros(0)


def _shared(got: Tensor, wanted: Tensor, patches: range) -> Tensor:
    """Of each image, how far the places `got` [B, n] and `wanted` [B, n'] agree: [B]."""
    ours, theirs = (
        torch.zeros(places.shape[0], patches.stop + 1, dtype=torch.bool).scatter(
            1, places.where(places >= 0, patches.stop).clamp(max=patches.stop), True
        )[:, patches.start : patches.stop]
        for places in (got, wanted)
    )
    return 2 * (ours & theirs).sum(1) / (ours.sum(1) + theirs.sum(1)).clamp_min(1)


def _bound(runtime: str, pruned: bool, precision: str, error: float, tolerance: float) -> None:
    if not error <= tolerance:
        raise MismatchError(
            f"{runtime} ({'pruned' if pruned else 'dense'}, {precision}) is not timed: its logits "
            f"are {error:.2g} off the float32 reference, more than {tolerance:g}"
        )
