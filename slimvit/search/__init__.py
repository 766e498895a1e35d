"""What finds masks and plans: Algorithm 1, its scores and budgets; DPS, absorb, thresholds."""

from slimvit.search.absorb import Trial, fit_absorb
from slimvit.search.api import Result, prune, search
from slimvit.search.predictors import PredictorReport, fit_dps, train_dps
from slimvit.search.scores import SCORES, LayerView
from slimvit.search.thresholds import fit_thresholds

__all__ = [
    "SCORES",
    "LayerView",
    "PredictorReport",
    "Result",
    "Trial",
    "fit_absorb",
    "fit_thresholds",
    "fit_dps",
    "prune",
    "search",
    "train_dps",
]
