"""The demo: a small ViT trained on handwritten digits, pruned and timed on this machine.

    outcome = run(Settings())
    outcome.masks, outcome.final.top1, outcome.digits.ratios

`python -m slimvit.demo.train` makes the weights that the package ships.
"""

from slimvit.demo._digits import Batches, Split, held_out_batches, load_splits
from slimvit.demo._model import build, facts, load
from slimvit.demo._pipeline import Outcome, Settings, run
from slimvit.demo._report import (
    HEADER,
    WAYS_HEADER,
    caption,
    left_out,
    rows,
    to_json,
    to_markdown,
    ways,
)

__all__ = [
    "HEADER",
    "WAYS_HEADER",
    "Batches",
    "Outcome",
    "Settings",
    "Split",
    "build",
    "caption",
    "facts",
    "held_out_batches",
    "left_out",
    "load",
    "load_splits",
    "rows",
    "run",
    "to_json",
    "to_markdown",
    "ways",
]
