"""The slimmed model in plain PyTorch: trainable, exportable, and the oracle of every back end."""

from __future__ import annotations

import os

import torch
from torch import nn

from slimvit import models
from slimvit.dynamic import Planner, load_plan
from slimvit.errors import UsageError
from slimvit.masks import Masks


@torch.inference_mode(False)  # what it returns can be trained
def apply_masks(
    model: nn.Module, masks: Masks | Planner | str | os.PathLike[str]
) -> models.SlimmedViT:
    """A copy of `model` that computes only the kept tokens; the given model is not changed.

    The copy is an instance of the model's own class with the same state dict, so weights move
    freely between the two. With masks, tokens are put in lifetime order once, after the embedding;
    every kept set is then a prefix, and no block gathers. With a dynamic plan each image has kept
    sets of its own, and the plan's own weights, if it has any, are in the state dict as `plan.…`.

    Args:
        model: a timm VisionTransformer, in any mode, on any device.
        masks: kept sets, a dynamic plan, or the path of a file with either.

    Returns:
        A model with timm's calls: `forward`, `forward_features` (kept tokens in their places,
        zero elsewhere), `forward_head`. What it keeps is in `.masks` or `.plan`, and of given
        images in `.kept_sets(images)`; `.dense()` gives timm's model back.

    Raises:
        UsageError: `masks` are neither masks nor a plan nor a file's name.
        UnsupportedModelError: the model cannot be slimmed.
        MasksError: the masks are wrong or do not fit the model.
        PlanError: the plan is wrong or does not fit the model.

    Source: Patch Slimming (Tang et al., CVPR 2022), Eq. 2.
    """
    if not isinstance(masks, (Masks, Planner, str, os.PathLike)):
        found = type(masks).__name__
        raise UsageError(f"masks must be Masks, a Planner or a file of either, got {found}")
    kept = masks if isinstance(masks, (Masks, Planner)) else load_plan(masks)
    spec = models.spec(model)
    if isinstance(kept, Planner):
        kept = kept.bind(spec)
        slim = models.copied(model)
        slim.__class__ = models.dynamic_class(type(model))
        slim.set_plan(kept)
        return slim
    models.check_masks(kept, spec)
    slim = models.copied(model)
    slim.__class__ = models.slim_class(type(model))
    slim.set_masks(kept)
    return slim
