"""Arguments become Python's own values, or one error with the name, the rule and the value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slimvit.checks import iterable, number, numbers, one_of, whole, wholes
from slimvit.errors import PlanError, UsageError


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3), True + 2])
def test_whole_numbers_of_any_kind_are_ints(value):
    found = whole("n", value, 3)
    assert type(found) is int and found == 3


@pytest.mark.parametrize(
    "value, message",
    [
        (2, "n must be at least 3, got 2"),
        (3.0, "n must be a whole number, got 3.0"),
        ("3", "n must be a whole number, got '3'"),
        (None, "n must be a whole number, got None"),
    ],
)
def test_other_whole_numbers_are_refused(value, message):
    with pytest.raises(PlanError, match=f"^{message}$"):
        whole("n", value, 3, PlanError)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), torch.tensor(0.5)])
def test_numbers_of_any_kind_are_floats(value):
    found = number("p", value, above=0, below=1)
    assert type(found) is float and found == 0.5


@pytest.mark.parametrize(
    "value, bounds, message",
    [
        (0, {"above": 0}, "p must be finite and above 0, got 0"),
        (-0.1, {"least": 0}, "p must be finite and at least 0, got -0.1"),
        (1, {"above": 0, "below": 1}, "p must be finite, above 0 and below 1, got 1"),
        (1.5, {"least": 0, "most": 1}, "p must be finite, at least 0 and at most 1, got 1.5"),
        (float("nan"), {"above": 0}, "p must be finite and above 0, got nan"),
        (float("inf"), {}, "p must be finite, got inf"),
        ("0.5", {}, "p must be a number, got '0.5'"),
        (10**400, {}, "p must be a number, got 1"),
        (None, {}, "p must be a number, got None"),
    ],
)
def test_other_numbers_are_refused(value, bounds, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        number("p", value, **bounds)


def test_bounds_that_belong_are_taken():
    assert number("p", 0, least=0, most=1) == 0
    assert number("p", 1, least=0, most=1) == 1


@pytest.mark.parametrize("values", [(1, 2), [np.int64(1), 2], torch.tensor([1, 2]), range(1, 3)])
def test_whole_numbers_in_any_list_are_ints(values):
    found = wholes("counts", values, 1)
    assert found == (1, 2) and {type(n) for n in found} == {int}


@pytest.mark.parametrize("check, kind", [(wholes, "whole numbers"), (numbers, "numbers")])
@pytest.mark.parametrize("values", [5, None, "12", b"12", torch.tensor(5), np.array(5)], ids=repr)
def test_what_is_no_list_is_refused(check, kind, values):
    with pytest.raises(PlanError) as caught:
        check("counts", values, error=PlanError)
    assert str(caught.value) == f"counts must be {kind} in a list, got {values!r}"


def test_wrong_numbers_in_a_list_are_refused():
    with pytest.raises(UsageError, match=r"^each of counts must be a whole number, got 1\.5$"):
        wholes("counts", [1, 1.5])
    with pytest.raises(PlanError, match="^each of counts must be at least 1, got 0$"):
        wholes("counts", [1, 0], 1, PlanError)
    with pytest.raises(UsageError, match="^each of shares must be finite, got nan$"):
        numbers("shares", [1, float("nan")])
    assert numbers("shares", np.array([0.5, 1])) == (0.5, 1.0)


def test_one_of_names():
    assert one_of("kind", "b", {"a": 1, "b": 2}) == "b"
    for value in ("c", None, 1, ["a"]):
        with pytest.raises(UsageError, match="kind must be one of a, b, got ") as caught:
            one_of("kind", value, ("a", "b"))
        assert repr(value) in str(caught.value)


def test_what_gives_no_batches_is_refused():
    for loader in ([], (), "text", torch.zeros(2), iter([1]), range(3)):
        assert iterable("loader", loader) is loader
    for loader, kind in ((None, "NoneType"), (5, "int"), (torch.nn.Linear(1, 1), "Linear")):
        with pytest.raises(UsageError, match=f"^loader must give batches one by .*, got {kind}$"):
            iterable("loader", loader)
