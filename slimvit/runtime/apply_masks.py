"""The slimmed model in plain PyTorch: trainable, exportable, and the oracle of every back end."""

from __future__ import annotations

import copy
import os

from torch import nn

from slimvit import models
from slimvit.masks import Masks


def apply_masks(model: nn.Module, masks: Masks | str | os.PathLike[str]) -> nn.Module:
    """A copy of `model` that computes only the kept tokens; the given model is not changed.

    The copy is an instance of the model's own class with the same state dict, so weights move
    freely between the two. Tokens are put in lifetime order once, after the embedding; every
    kept set is then a prefix, and no block gathers.

    Args:
        model: a timm VisionTransformer, in any mode, on any device.
        masks: kept sets, or the path of a masks file.

    Returns:
        A model with timm's calls: `forward`, `forward_features` (kept tokens in their places,
        zero elsewhere), `forward_head`. Its masks are in `.masks`.

    Raises:
        UnsupportedModelError: the model cannot be slimmed.
        MasksError: the masks are wrong or do not fit the model.

    Source: Patch Slimming (Tang et al., CVPR 2022), Eq. 2.
    """
    masks = masks if isinstance(masks, Masks) else Masks.load(masks)
    models.check_masks(masks, models.spec(model))
    slim = copy.deepcopy(model)
    slim.__class__ = models.slim_class(type(model))
    slim.set_masks(masks)
    return slim
