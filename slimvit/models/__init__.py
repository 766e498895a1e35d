"""Foreign models: the only place that knows timm's classes."""

from slimvit.models.copying import copied
from slimvit.models.create import create, load_checkpoint
from slimvit.models.dynamic import dynamic_class
from slimvit.models.mode import evaluating, own_precision, refuse_inference_mode
from slimvit.models.slim import SlimmedViT, slim_class
from slimvit.models.spec import Spec
from slimvit.models.vision_transformer import (
    block_module,
    block_parts,
    check_masks,
    embed,
    spec,
)

__all__ = [
    "SlimmedViT",
    "Spec",
    "block_module",
    "block_parts",
    "check_masks",
    "copied",
    "create",
    "dynamic_class",
    "embed",
    "evaluating",
    "load_checkpoint",
    "own_precision",
    "refuse_inference_mode",
    "slim_class",
    "spec",
]
