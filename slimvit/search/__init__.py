"""The static search: Algorithm 1 of Patch Slimming, its scores, its budgets."""

from slimvit.search.api import Result, prune, search
from slimvit.search.scores import SCORES, LayerView

__all__ = ["SCORES", "LayerView", "Result", "prune", "search"]
