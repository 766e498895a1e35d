"""Budgets other than a tolerance, without the search that they steer."""

import pytest

from slimvit import Masks, macs, models
from slimvit.search.budget import bisect, uniform_counts


@pytest.mark.parametrize("least", [3e-5, 1e-3, 0.3])
def test_the_tolerance_is_found_to_two_per_cent_whatever_its_size(least):
    found = bisect(lambda tolerance: tolerance, lambda tolerance: tolerance >= least, "cut")
    assert least <= found <= 1.02 * least


def test_uniform_counts_may_keep_the_prefix_alone(tiny_vit):
    spec = models.spec(tiny_vit)
    masks = Masks.from_counts([spec.prefix] * spec.depth, spec.grid, spec.prefix)
    assert uniform_counts(spec, macs.cut(spec, masks), "drop") == masks.counts
