"""Pictures of what a dynamic plan does to one image, and of its counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn

from slimvit.dynamic.planner import Planner
from slimvit.masks import _plot
from slimvit.ops import Alive, Choice, View, complement

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_kept(slim: nn.Module, image: Tensor, picture: object = None) -> Figure:
    """Draw one panel a block: what the block computes of one image.

    Kept patches are in full colour and pruned ones faded away. Patches that were averaged into one
    token have their mean colour, as pictures of merged tokens do.

    Args:
        slim: what `apply_masks(model, plan)` returns.
        image: what it is given, [1, C, H, W].
        picture: the same image to draw on: an array, tensor or PIL image as `Masks.plot` takes;
            plain squares without one.

    Returns:
        A figure outside pyplot's state: `figure.savefig("kept.png")`.

    Raises:
        DataError: `picture` is no image.
        SlimvitError: matplotlib is not installed.
    """
    plan = slim.plan
    canvas = _plot.fit(picture, plan.grid)
    owners = [_patches(owner, plan) for owner in groups(slim, image)]
    drawn = [_plot.fade(averaged(canvas, owner), owner >= 0) for owner in owners]
    bare = [bool((owner < 0).all()) for owner in owners]
    return _plot.panels(drawn, plan.counts, bare, _headline(plan))


def plot_counts(plan: Planner) -> Figure:
    """Draw how many tokens each block computes: one bar a block, the first at the bottom."""
    return _plot.plot_counts(plan.counts, plan.tokens, _headline(plan))


@torch.no_grad()
def groups(slim: nn.Module, image: Tensor) -> list[Tensor]:
    """Which kept token each of the N tokens is part of after each block: L of [N], int64.

    Args:
        slim: what `apply_masks(model, plan)` returns.
        image: [1, C, H, W].

    Returns:
        Places: its own for a token that is kept, that of the token which it was averaged into, and
        -1 for one that is gone or in a package.
    """
    plan, seen = slim.plan, {}
    choose = plan.choose

    def watch(layer: int, view: View, n: int) -> Choice:
        choice = choose(layer, view, n)
        seen[layer] = (view.alive.place[0], choice)
        return choice

    vars(plan)["choose"] = watch
    try:
        left = slim.trace(image)[1]
    finally:
        del vars(plan)["choose"]
    owner, found = torch.arange(plan.tokens), []
    for layer, alive in enumerate(left):
        owner = _follow(owner, seen.get(layer), alive)
        found.append(owner)
    return found


def _follow(owner: Tensor, chosen: tuple[Tensor, Choice] | None, left: Alive) -> Tensor:
    """`owner` after a block: pruned tokens hand what they own to those that take them in."""
    into = torch.arange(len(owner))
    if chosen is not None and chosen[1].into is not None:
        place, choice = chosen[0].cpu(), chosen[1]
        pruned = place[complement(choice.index, len(place))[0].cpu()]
        into[pruned] = place[choice.index[0].cpu()][choice.into[0].cpu()]
    alive = torch.zeros(len(owner), dtype=torch.bool)
    places = left.place[0].cpu()
    alive[places[places < len(owner)]] = True
    after = into[owner.clamp(min=0)]
    return torch.where((owner >= 0) & alive[after], after, -1)


def averaged(canvas: numpy.ndarray, owner: numpy.ndarray) -> numpy.ndarray:
    """The canvas [H, W, 3] with the mean colour of each group of patches all over it.

    Args:
        canvas: uint8 [H, W, 3].
        owner: for each patch of the grid the patch that stands for it, -1 for none.
    """
    cell = canvas.shape[0] // owner.shape[0]
    wide = owner.repeat(cell, 0).repeat(cell, 1)  # [H, W]
    out = canvas.copy()
    for group, members in zip(*numpy.unique(owner, return_counts=True), strict=True):
        if group >= 0 and members > 1:
            out[wide == group] = canvas[wide == group].mean(0).round()
    return out


def _patches(owner: Tensor, plan: Any) -> numpy.ndarray:
    return owner[plan.prefix :].view(plan.grid).numpy()


def _headline(plan: Planner) -> str:
    name = plan.spec.name if plan.spec is not None else ""
    return _plot.headline(name, plan.counts, plan.tokens, plan.prefix, plan.kind)
