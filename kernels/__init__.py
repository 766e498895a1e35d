"""Triton kernels of slimvit, installed as `slimvit.kernels`. They import torch and triton only.

Tensors come contiguous and of the shapes that each function names: whoever calls has checked that.
Half precision is accumulated in float32, and softmax and norms are in float32.
"""

if __name__ == "kernels":
    raise ImportError(
        "this folder is slimvit.kernels, found as `kernels` because slimvit's repository root is "
        "on sys.path: write `import slimvit.kernels`, or start Python in another folder to reach "
        "Hugging Face's package of that name"
    )

from .absorb_merge import absorb_merge, absorb_select
from .absorb_scores import absorb_scores
from .common import ACTIVATIONS, INTERPRETED, architecture, part_width
from .configs import Config, family, lookup
from .last_attention import MOST_CHANNELS, MOST_QUERIES, last_attention
from .package_tokens import package_tokens, selector_choose
from .patch_embedding import patch_embedding
from .row_stats import row_stats
from .scatter_tokens import scatter_tokens
from .selector import selector_judge
from .slim_attention import slim_attention
from .slim_linear import slim_linear, slim_qkv
from .slim_mlp import halves, slim_mlp
from .top_tokens import top_tokens

__all__ = [
    "ACTIVATIONS",
    "INTERPRETED",
    "MOST_CHANNELS",
    "MOST_QUERIES",
    "Config",
    "absorb_merge",
    "absorb_scores",
    "absorb_select",
    "architecture",
    "family",
    "halves",
    "last_attention",
    "lookup",
    "package_tokens",
    "part_width",
    "patch_embedding",
    "row_stats",
    "scatter_tokens",
    "selector_choose",
    "selector_judge",
    "slim_attention",
    "slim_linear",
    "slim_mlp",
    "slim_qkv",
    "top_tokens",
]
