"""What the searches that end with a plan tell of it."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from slimvit.macs import cut, gmacs
from slimvit.models import Spec

if TYPE_CHECKING:
    from slimvit.data import Batches
    from slimvit.dynamic import Planner


def values_of(
    args: argparse.Namespace, plan: Planner, shape: Spec, images: Batches, start: float
) -> dict[str, Any]:
    """The JSON that every such search begins with; `start` is when it began."""
    return {
        "model": args.model,
        "plan": plan.kind,
        "kept": list(plan.counts),
        "cut": cut(shape, plan),
        "seconds": time.perf_counter() - start,
        "gmacs": gmacs(shape, plan),
        "dense_gmacs": gmacs(shape),
        "images": len(images.dataset) - len(images.dataset.skipped),
        "skipped": len(images.dataset.skipped),
        "data": images.dataset.fingerprint,
        "output": str(args.output),
    }
