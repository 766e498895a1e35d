"""What planners and their schedules refuse, by name, rule and value."""

import pytest
from references import build

from slimvit import DPS, Absorb, SPViT
from slimvit.dynamic import Shape, counts_for_cut
from slimvit.errors import PlanError
from slimvit.macs import cut, paper_gmacs
from slimvit.models import spec

NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Absorb(counts=5), "counts must be whole numbers in a list, got 5"),
        (lambda: DPS(5), "counts must be whole numbers in a list, got 5"),
        (lambda: DPS("17"), "counts must be whole numbers in a list, got '17'"),
        (lambda: Absorb(0.2, thresholds=3), "thresholds must be numbers in a list, got 3"),
        (lambda: Shape(-3), "whole must be at least 0, got -3"),
        (lambda: Shape(power=-1), "power must be finite and above 0, got -1"),
        (lambda: Shape(power=NAN), "power must be finite and above 0, got nan"),
        (lambda: Shape(steepest=2), "steepest must be .* at most 1, got 2"),
    ],
)
def test_refused(make, words):
    with pytest.raises(PlanError, match=words):
        make()


@pytest.mark.parametrize("share", [NAN, -1, 0, "a"])
def test_counts_for_cut_takes_a_share(share):
    with pytest.raises(PlanError, match="cut must be .*, got"):
        counts_for_cut(spec(build("deit")), share, lambda counts: Absorb(counts=counts))


@pytest.mark.parametrize("count", [cut, paper_gmacs])
@pytest.mark.parametrize("plan", [Absorb(0.2), DPS([9, 1]), SPViT([0.5])], ids=lambda p: p.kind)
def test_work_of_a_plan_that_is_not_bound(plan, count):
    with pytest.raises(PlanError, match=f"{plan.kind}: bind it to a model first"):
        count(spec(build("deit")), plan)
