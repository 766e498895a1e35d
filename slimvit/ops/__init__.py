"""The operations of a slimmed transformer, each defined by its reference in plain PyTorch."""

from slimvit.ops.choosers import (
    AbsorbParts,
    ChooserParts,
    PredictorParts,
    SelectorParts,
    Threshold,
    candidates,
    why_not_chosen,
)
from slimvit.ops.dynamic_block import (
    Alive,
    Choice,
    View,
    absorb_tokens,
    complement,
    dynamic_block,
    rows_of,
    top,
)
from slimvit.ops.dynamic_vit import DynamicNetwork, pack_chooser
from slimvit.ops.folded_block import FoldedBlock
from slimvit.ops.fused_dynamic import FusedDynamicNetwork
from slimvit.ops.fused_vit import FusedBlock, FusedNetwork, why_not_fused
from slimvit.ops.network import NetworkParts
from slimvit.ops.scatter_tokens import scatter_tokens
from slimvit.ops.slim_attention import attention_probabilities, slim_attention
from slimvit.ops.slim_block import (
    BlockParts,
    ExtraKey,
    project_qkv,
    slim_block,
    take,
    zero_key,
)
from slimvit.ops.slim_vit import PackedNetwork, pack_block, why_not_packed

__all__ = [
    "AbsorbParts",
    "Alive",
    "ChooserParts",
    "DynamicNetwork",
    "PredictorParts",
    "SelectorParts",
    "Threshold",
    "pack_chooser",
    "Choice",
    "View",
    "absorb_tokens",
    "complement",
    "dynamic_block",
    "top",
    "BlockParts",
    "ExtraKey",
    "FoldedBlock",
    "FusedBlock",
    "FusedDynamicNetwork",
    "FusedNetwork",
    "NetworkParts",
    "PackedNetwork",
    "attention_probabilities",
    "candidates",
    "pack_block",
    "project_qkv",
    "rows_of",
    "scatter_tokens",
    "slim_attention",
    "slim_block",
    "take",
    "why_not_chosen",
    "why_not_fused",
    "why_not_packed",
    "zero_key",
]
