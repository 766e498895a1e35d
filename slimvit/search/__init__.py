"""The static search: Algorithm 1 of Patch Slimming, its scores, its budgets."""

from slimvit.search.absorb import fit_absorb
from slimvit.search.api import Result, prune, search
from slimvit.search.scores import SCORES, LayerView

__all__ = ["SCORES", "LayerView", "Result", "fit_absorb", "prune", "search"]
