"""Rounds alternate, and disturbed ones are repeated; the clock is made up."""

import pytest
import torch

from slimvit.bench import _rounds


class Clock:
    """A time module in which a call of `run` takes a second of CPU at that share of wall time."""

    def __init__(self, shares):
        self.shares, self.wall, self.cpu = list(shares), 0.0, 0.0

    def run(self, images):
        self.wall += 1 / (self.shares.pop(0) if self.shares else 1.0)
        self.cpu += 1
        return images

    def perf_counter(self):
        return self.wall

    def process_time(self):
        return self.cpu


def timed(monkeypatch, shares, rounds, rows=1):
    """What `measure` finds; `shares` are of the timed calls, which follow an untimed one each."""
    warm_up = [1.0] * _rounds._WARM_UP_CALLS * rows
    clock = Clock(warm_up + [s for share in shares for s in (1.0, share)])
    monkeypatch.setattr(_rounds, "time", clock)
    return _rounds.measure(
        [[clock.run] * rows], [torch.zeros(4, 3, 2, 2)], rounds=rounds, seconds=0.5, threads=1
    )


def test_quiet_rounds_count(monkeypatch):
    found = timed(monkeypatch, [1.0, 0.95, 0.9], rounds=3)
    assert found.rates[0][0] == pytest.approx([4.0, 3.8, 3.6])
    assert (found.rejected, found.disturbed, found.best_share) == (0, 0, 1.0)


def test_disturbed_rounds_are_repeated(monkeypatch):
    found = timed(monkeypatch, [1.0, 0.5, 0.6, 1.0, 1.0], rounds=3)
    assert (found.rejected, found.disturbed) == (2, 0)


def test_a_round_is_disturbed_in_the_light_of_later_ones(monkeypatch):
    found = timed(monkeypatch, [0.5, 1.0], rounds=2)
    assert (found.rejected, found.disturbed) == (1, 0)


def test_the_quietest_attempt_counts(monkeypatch):
    found = timed(monkeypatch, [1.0, 0.8, 0.6, 0.4], rounds=2)
    assert (found.rejected, found.disturbed) == (2, 1)
    assert found.rates[0][0] == pytest.approx([4.0, 3.2])


def test_a_group_is_as_quiet_as_its_worst_row(monkeypatch):
    found = timed(monkeypatch, [1.0, 1.0, 1.0, 0.5], rounds=2, rows=2)
    assert (found.rejected, found.disturbed) == (1, 0)


def test_repeats_are_bounded(monkeypatch):
    found = timed(monkeypatch, [1.0] + [0.5] * 50, rounds=3)
    assert (found.rejected, found.disturbed) == (3, 2)
    assert len(found.rates[0][0]) == 3


def test_rounds_alternate():
    order = []
    runs = [[lambda images, name=name: order.append(name)] for name in "abc"]
    _rounds.measure(runs, [torch.zeros(1, 3, 2, 2)], rounds=2, seconds=1e-9, threads=1)
    turns = "".join(order)[3 * _rounds._WARM_UP_CALLS :]
    assert turns.startswith("aabbccaabbcc")  # one untimed and one timed call each
