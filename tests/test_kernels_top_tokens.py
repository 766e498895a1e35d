"""Triton's choice of the highest scores, and of what those absorb."""

import pytest
import torch
from choice_checks import CHOICES, check_select, chosen, hard_scores
from kernel_checks import (
    DTYPES,
    Random,
    kernels,
)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.usefixtures("poison_empty")


@pytest.mark.parametrize("kind", ["", "ties", "nan", "equal", "tiny"])
@pytest.mark.parametrize(("batch", "m", "n", "prefix"), CHOICES)
def test_top_tokens(batch, m, n, prefix, kind):
    scores = hard_scores(batch, m, kind)
    got = kernels.top_tokens(scores, n, prefix)
    assert got.dtype == torch.int64
    assert got.tolist() == chosen(scores, n, prefix)


@dtypes
@pytest.mark.parametrize(("batch", "m", "n", "prefix"), CHOICES[1:7])
@pytest.mark.parametrize("channels", [16, 48])
def test_top_tokens_of_what_predicts_them(dtype, batch, m, n, prefix, channels):
    random = Random(m)
    hidden, weight = random(batch, m, channels, dtype=dtype), random(channels)
    exact = (hidden.double() @ weight.double()).sort(1).values
    # No two scores are so near to each other that float32 could take one for the other.
    assert (exact.diff(dim=1).min() / exact.abs().max()) > 1e-7
    got = kernels.top_tokens(hidden, n, prefix, weight=weight)
    assert got.tolist() == chosen(hidden.double() @ weight.double(), n, prefix)


SELECTIONS = [(kind, *choice) for kind in ("", "ties", "nan") for choice in CHOICES[:4]]
SELECTIONS += [("", *CHOICES[5]), ("ties", *CHOICES[4]), ("nan", *CHOICES[6])]


@pytest.mark.parametrize(("kind", "batch", "m", "n", "prefix"), SELECTIONS)
def test_select(kind, batch, m, n, prefix):
    check_select(kernels.absorb_select, kind, batch, m, n, prefix)
