"""How long and on how many threads is timed: checked in every call that times."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import slimvit
from slimvit import bench
from slimvit.bench import _latency, _target, latency_table, measure_latency, time_calls
from slimvit.bench._rounds import Measured
from slimvit.bench._timing import MOST_THREADS, Timing, read_timing
from slimvit.cli import main
from slimvit.errors import UsageError
from slimvit.masks import Masks

NAN = float("nan")
WRONG = [
    ({"seconds": NAN}, "seconds must be finite and above 0, got nan"),
    ({"seconds": -1}, "seconds must be finite and above 0, got -1"),
    ({"seconds": "1"}, "seconds must be a number, got '1'"),
    ({"rounds": 0}, "rounds must be at least 1, got 0"),
    ({"rounds": 1.5}, "rounds must be a whole number, got 1.5"),
    ({"threads": -1}, "threads must be at least 1, got -1"),
    ({"threads": 0}, "threads must be at least 1, got 0"),
    ({"threads": 100_000}, f"threads must be at most {MOST_THREADS} here, got 100000"),
]


@pytest.mark.parametrize("options, message", WRONG)
def test_wrong_timing_is_refused(tiny_vit, monkeypatch, options, message):
    for module in (_latency, bench._run):
        monkeypatch.setattr(module, "measure", lambda *_, **__: pytest.fail("it was timed"))
    masks, images = Masks.from_counts([9] * 5 + [1], (4, 4)), torch.zeros(1, 3, 64, 64)
    for call in (
        lambda: latency_table(tiny_vit, **options),
        lambda: time_calls([tiny_vit], images, **options),
        lambda: bench.bench(tiny_vit, masks, against=[], **options),
    ):
        with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
            call()


def test_timing_is_in_plain_numbers():
    found = read_timing(np.int64(3), torch.tensor(0.5), np.int32(2))
    assert found == Timing(3, 0.5, 2) and [type(n) for n in found] == [int, float, int]
    assert read_timing(1, 1, None).threads == torch.get_num_threads()
    assert read_timing(1, 1, MOST_THREADS).threads == MOST_THREADS


@pytest.mark.parametrize("seconds", [NAN, 0, "1"])
def test_a_latency_is_measured_for_some_time(tiny_vit, made_up, seconds):
    plan = slimvit.SPViT((0.5,), stages=(2,))
    for call in (
        lambda: measure_latency(tiny_vit, plan, made_up, seconds=seconds),
        lambda: bench.plan_for_latency(tiny_vit, made_up, 1.0, seconds=seconds),
    ):
        with pytest.raises(UsageError, match="^seconds must be"):
            call()


@pytest.mark.parametrize(
    "target, options, message",
    [
        (1.0, {"tries": 0}, "tries must be at least 1, got 0"),
        (1.0, {"within": -0.1}, "within must be finite and at least 0, got -0.1"),
        (NAN, {}, "target_ms must be finite, got nan"),
        ("1", {}, "target_ms must be a number, got '1'"),
    ],
)
def test_wrong_targets_are_refused(tiny_vit, made_up, target, options, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        bench.plan_for_latency(tiny_vit, made_up, target, **options)


@pytest.fixture
def made_up(tiny_vit, monkeypatch):
    """A table of times that no clock has told; nothing is measured."""
    monkeypatch.setattr(_target, "measure", lambda *_, **__: pytest.fail("it was timed"))
    with monkeypatch.context() as patch:
        patch.setattr(_latency, "measure", told(lambda i: 1.0 + i))
        return latency_table(tiny_vit, ratios=(1.0, 0.5), backend="torch")


def told(ms):
    """A `measure` by which the call number i takes ms(i)."""

    def measured(groups, images, **_):
        return Measured([[[1000 * len(images) / ms(i)]] for i in range(len(groups))])

    return measured


@pytest.mark.parametrize("dense_ms, warned", [(100.0, False), (0.5, True)])
def test_a_rest_of_less_than_nothing_is_told(tiny_vit, monkeypatch, caplog, dense_ms, warned):
    """Two rows of blocks, last block and selector, 1 ms each; then two whole models."""
    monkeypatch.setattr(_latency, "measure", told(lambda i: 1.0 if i < 6 else dense_ms))
    with caplog.at_level(logging.WARNING, "slimvit"):
        table = latency_table(tiny_vit, ratios=(1.0, 0.5), backend="torch")
    assert (table.rest_ms < 0) == warned
    assert ["rest_ms is" in line and "more rounds" in line for line in caplog.messages] == (
        [True] * warned
    )


def test_commands_refuse_threads_that_cannot_be_started(capsys):
    shared = ["--model", "test_vit", "--img-size", "64", "--threads", "100000", "--device", "cpu"]
    for command in (["bench", "--absorb", "0.3"], ["latency-table"]):
        assert main([*command, *shared]) == 2
        error = capsys.readouterr().err
        assert f"threads must be at most {MOST_THREADS} here, got 100000" in error
        assert error.count("\n") == 1


def test_masks_of_a_file_and_of_no_kind(tiny_vit, tmp_path):
    tiny_vit.blocks = tiny_vit.blocks[:3]
    masks, path = Masks.from_counts((12, 5, 1), (4, 4)), tmp_path / "masks.safetensors"
    masks.save(path)
    quick = {"rounds": 1, "seconds": 0.001, "threads": 1, "backend": "torch", "against": []}
    for given in (path, str(path)):
        assert bench.bench(tiny_vit, given, **quick).kept == masks.counts
    for given, kind in ((None, "NoneType"), ([12, 5, 1], "list")):
        with pytest.raises(UsageError, match=f"masks must be Masks, a Planner .*, got {kind}"):
            bench.bench(tiny_vit, given, **quick)
    with pytest.raises(slimvit.errors.SlimvitError, match="absent"):
        bench.bench(tiny_vit, Path("absent.safetensors"), **quick)
