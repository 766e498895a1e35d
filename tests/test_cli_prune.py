"""`slimvit prune`: what is left behind when it fails or is stopped, and that it goes on."""

import errno
import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch

from slimvit import Masks, cli, load_plan
from slimvit.search.state import State

STATE = "plan.search.safetensors"


@pytest.fixture
def searched(monkeypatch) -> list[int]:
    """Blocks that a search had to look at."""
    seen, add = [], State.add

    def remember(self, name, found):
        seen.append(found.layer)
        add(self, name, found)

    monkeypatch.setattr(State, "add", remember)
    return seen


def test_masks_that_cannot_be_written_are_not_lost(prune, searched, monkeypatch):
    def full(self, path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Masks, "save", full)
        status, _, error = prune("--tolerance", "0.3")
    assert status == 1 and "No space left on device" in error
    assert Path(STATE).exists() and len(searched) == 6
    status, _, error = prune("--tolerance", "0.3")
    assert status == 0, error
    assert len(searched) == 6 and not Path(STATE).exists()


def test_dynamic_goes_on_where_its_predictors_were_stopped(prune, searched, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    flags = ("--dynamic", "--predictor-epochs", "1", "--tolerance", "0.3")
    with monkeypatch.context() as patch:
        patch.setattr("slimvit.cli._dps.fit_dps", stop)
        status, _, error = prune(*flags)
    assert status == 130 and f"the same command goes on from {STATE}" in error
    masks = Masks.load("plan.masks.safetensors")
    assert Path(STATE).exists() and len(searched) == 6
    status, _, error = prune(*flags)
    assert status == 0, error
    assert len(searched) == 6 and not Path(STATE).exists()
    assert torch.equal(Masks.load("plan.masks.safetensors").keep, masks.keep)
    assert load_plan("plan.safetensors").counts == masks.counts


def test_a_budget_out_of_reach_does_not_stand_in_the_way(prune):
    status, _, error = prune("--cut", "0.99")
    assert status == 1 and "cut 0.99 is out of reach" in error
    status, _, error = prune("--cut", "0.2")
    assert status == 0, error


def test_sigterm_leaves_the_state_and_no_features(prune, searched, monkeypatch):
    def kill(*_):
        raise AssertionError("SIGTERM came here")

    folder = Path("temporary")
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder.absolute()))
    add = State.add

    def stop(self, name, found):
        add(self, name, found)
        assert len(list(folder.rglob("*.bin"))) > 0
        if len(self.done(name)) == 2:  # the first of them was known beforehand
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, kill)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(State, "add", stop)
            status, out, error = prune("--tolerance", "0.3", "--cache-bytes", "0")
        assert (status, out) == (143, "") and "the same command goes on" in error
        assert signal.getsignal(signal.SIGTERM) is kill
    finally:
        signal.signal(signal.SIGTERM, before)
    assert list(folder.iterdir()) == [] and Path(STATE).exists()
    assert prune("--tolerance", "0.3")[0] == 0
    assert sorted(searched) == [1, 2, 3, 4, 5, 6]


def test_counts_are_one_for_each_block(prune):
    status, _, error = prune("--counts", "9,1")
    assert status == 2 and "counts must be one for each of 6 blocks, got 2" in error


def test_only_the_precision_that_searches_compute_in_is_offered(capsys):
    assert cli.main(["prune", "--help"]) == 0
    assert "--precision {float32}" in capsys.readouterr().out


def test_counts_must_end_with_what_the_head_reads(prune):
    status, _, error = prune("--counts", "9x6")
    assert status == 2 and "counts must end with 1, what the head reads" in error
