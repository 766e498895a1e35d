"""slimvit: vision transformers that compute only the patches that matter.

    masks = slimvit.prune(model, loader, tolerance=0.02)   # Algorithm 1 of Patch Slimming
    slim = slimvit.apply_masks(model, masks)               # trainable, plain PyTorch, exportable
    fast = slimvit.accelerate(model, masks)                # inference: same call, same outputs
    fast = slimvit.accelerate(model, slimvit.Absorb(cut=0.45))  # each image its own patches

Names, and subpackages such as `slimvit.search`, load on first use, so that `import slimvit` costs
nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "Absorb": "slimvit.dynamic",
    "DPS": "slimvit.dynamic",
    "Masks": "slimvit.masks",
    "Planner": "slimvit.dynamic",
    "SPViT": "slimvit.dynamic",
    "SlimvitError": "slimvit.errors",
    "accelerate": "slimvit.runtime",
    "apply_masks": "slimvit.runtime",
    "load_plan": "slimvit.dynamic",
    "prune": "slimvit.search",
}
__all__ = [
    "DPS",
    "Absorb",
    "Masks",
    "Planner",
    "SPViT",
    "SlimvitError",
    "__version__",
    "accelerate",
    "apply_masks",
    "load_plan",
    "prune",
]

if TYPE_CHECKING:
    from slimvit.dynamic import DPS, Absorb, Planner, SPViT, load_plan
    from slimvit.errors import SlimvitError
    from slimvit.masks import Masks
    from slimvit.runtime import accelerate, apply_masks
    from slimvit.search import prune


def __getattr__(name: str) -> object:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"slimvit.{name}") is not None:
        value = importlib.import_module(f"slimvit.{name}")
    else:
        raise AttributeError(f"module 'slimvit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
