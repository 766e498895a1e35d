"""Planners that choose for each image which tokens to keep."""

from slimvit.dynamic.absorb import Absorb
from slimvit.dynamic.dps import DPS
from slimvit.dynamic.file import load_plan
from slimvit.dynamic.planner import Planner
from slimvit.dynamic.schedule import Shape, counts_for_cut
from slimvit.dynamic.spvit import SPViT
from slimvit.dynamic.static import Static
from slimvit.ops import Alive, Choice, View

__all__ = [
    "DPS",
    "Absorb",
    "Alive",
    "Choice",
    "Planner",
    "SPViT",
    "Shape",
    "Static",
    "View",
    "counts_for_cut",
    "load_plan",
]
