"""The state of a search: whose it is, how long it stays, and that it changes nothing."""

import functools
import importlib
import linecache
import subprocess
import sys

import pytest
import torch
from test_search import quick

from slimvit.errors import SearchError, SlimvitError, UsageError
from slimvit.search import SCORES
from slimvit.search.scores import eq6


@pytest.fixture
def state(tmp_path):
    return tmp_path / "search.state"


def stopped(model, batches, calls, **options) -> None:
    """A search in which Ctrl-C comes at a call of the score."""
    left = iter(range(calls))

    def interrupted(view):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return eq6(view)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCORES, "eq6", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quick(model, batches, **options)


@pytest.mark.parametrize("options", [{"tolerance": 0.02, "epochs": 1}, {"cut": 0.4}])
def test_interrupted_search_ends_alike(tiny_vit, batches, state, options):
    whole = quick(tiny_vit, batches, **options)
    for calls in (5, 9, 14):
        stopped(tiny_vit, batches, calls, state=state, **options)
        assert state.exists()
    resumed = quick(tiny_vit, batches, state=state, **options)
    assert torch.equal(resumed.masks.keep, whole.masks.keep)
    assert torch.equal(resumed.masks.errors, whole.masks.errors)
    assert torch.equal(resumed.masks.scores, whole.masks.scores)
    assert not state.exists()
    if whole.model is not None:
        for name, value in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], value), name


def test_state_of_another_search_is_refused(tiny_vit, batches, state):
    stopped(tiny_vit, batches, 5, tolerance=0.02, state=state)
    content = state.read_bytes()
    with pytest.raises(
        SlimvitError, match="another search: its tolerance is 0.02, here it is 0.03"
    ):
        quick(tiny_vit, None, tolerance=0.03, state=state)  # before any image is looked at
    with pytest.raises(SlimvitError, match="another search: its calibration images"):
        quick(tiny_vit, batches[:1], tolerance=0.02, state=state)
    with pytest.raises(SlimvitError, match='another search: its score is "eq6", here .*scores.eq6'):
        quick(tiny_vit, None, tolerance=0.02, score=eq6, state=state)
    assert state.read_bytes() == content
    quick(tiny_vit, batches, tolerance=0.03, state=state, restart=True)
    assert not state.exists()


def test_uniform_is_another_search(tiny_vit, batches, state):
    stopped(tiny_vit, batches, 8, cut=0.4, state=state)
    with pytest.raises(SlimvitError, match="another search: its counts is"):
        quick(tiny_vit, batches, cut=0.4, uniform=True, state=state)


def test_steps_of_another_batch_size_are_not_carried_on(tiny_vit, batches, state):
    stopped(tiny_vit, batches, 8, tolerance=0.02, epochs=1, state=state)
    other = torch.cat(batches).split(5)
    with pytest.raises(SlimvitError, match="its batch size is 3, here it is 5"):
        quick(tiny_vit, other, tolerance=0.02, epochs=1, state=state)


def test_speeds_that_were_measured_otherwise_are_not_used_again(
    tiny_vit, batches, state, monkeypatch
):
    speeds = iter([2.0])

    def measured(*_):
        if (speed := next(speeds, None)) is None:
            raise InterruptedError
        return speed

    monkeypatch.setattr("slimvit.search.api.measure_speedup", measured)
    with pytest.raises(InterruptedError):
        quick(tiny_vit, batches, speedup=1.5, state=state)
    with pytest.raises(SlimvitError, match="its batch size is 3, here it is 5"):
        quick(tiny_vit, torch.cat(batches).split(5), speedup=1.5, state=state)
    with pytest.raises(InterruptedError):  # the same search goes on to where it was
        quick(tiny_vit, batches, speedup=1.5, state=state)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.raises(SlimvitError, match="its threads is .*, here it is 77"):
        quick(tiny_vit, batches, speedup=1.5, state=state)
    monkeypatch.undo()
    monkeypatch.setattr("slimvit.backends.cpu.why_not", lambda *_: "it is switched off")
    with pytest.raises(SlimvitError, match='its back end is "cpu", here it is "torch"'):
        quick(tiny_vit, batches, speedup=1.5, state=state)


class Holder:
    def __call__(self, view):
        return eq6(view)

    method = __call__


@pytest.mark.parametrize(
    "score", [lambda view: eq6(view), functools.partial(eq6), Holder().method, Holder()]
)
def test_a_state_needs_a_score_of_a_name(tiny_vit, state, score):
    with pytest.raises(UsageError, match="state needs a score that its name tells from others"):
        quick(tiny_vit, None, tolerance=0.02, score=score, state=state)


def test_state_stays_as_long_as_the_caller_wants(tiny_vit, batches, state, monkeypatch):
    for options in ({"tolerance": 0.05, "epochs": 1}, {"cut": 0.4}):
        first = quick(tiny_vit, batches, state=state, keep_state=True, **options)
        with monkeypatch.context() as patch:
            patch.setattr("slimvit.search.algorithm1.score_layer", None)  # all is known
            again = quick(tiny_vit, batches, state=state, **options)
        assert torch.equal(first.masks.keep, again.masks.keep)
        if first.model is not None:
            for name, value in first.model.state_dict().items():
                assert torch.equal(again.model.state_dict()[name], value), name
        assert not state.exists()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"cut": 0.99}, "cut 0.99 is out of reach"),
        ({"counts": (9, 9, 9, 9, 9, 1), "epochs": 3, "lr": 1e30}, "diverged"),
    ],
)
def test_a_search_that_would_fail_again_leaves_no_state(tiny_vit, batches, state, options, words):
    with pytest.raises(SearchError, match=words):
        quick(tiny_vit, batches, state=state, **options)
    assert not state.exists()
    quick(tiny_vit, batches, state=state, cut=0.2)


@pytest.mark.parametrize("options", [{"tolerance": 0.02}, {"cut": 0.4}])
def test_a_score_that_fails_at_once_leaves_no_state(tiny_vit, batches, state, options):
    stopped(tiny_vit, batches, 0, state=state, **options)
    assert not state.exists()
    stopped(tiny_vit, batches, 6, state=state, **options)
    assert state.exists()


def test_a_state_that_could_not_be_written_is_refused_at_once(tiny_vit, tmp_path):
    """Before any image is looked at; not after the first block of the search."""
    missing = tmp_path / "missing"
    for path, rule in (
        (missing / "state", f"^state {missing}/state: the folder {missing} does not exist$"),
        (tmp_path, f"^state must be a file, got the folder {tmp_path}$"),
    ):
        with pytest.raises(UsageError, match=rule):
            quick(tiny_vit, None, tolerance=0.02, state=path)


def test_broken_state_is_an_error(tiny_vit, state):
    state.write_bytes(b"not a state")
    with pytest.raises(SlimvitError, match="not a readable search state"):
        quick(tiny_vit, None, tolerance=0.02, state=state)


CODE = """
import torch
from slimvit.search.scores import eq6
left = iter(range(4))
SIGN = +1
def scaled(rates):
    return 1.0 * rates
@torch.no_grad()
def mine(view):
    if next(left, None) is None:
        raise InterruptedError
    return SIGN * scaled(eq6(view))
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [("return SIGN", "return -SIGN"), ("SIGN = +1", "SIGN = -1"), ("1.0 * rates", "2.0 * rates")],
    ids=["function", "constant", "helper"],
)
def test_a_score_that_was_edited_is_another_score(
    tiny_vit, batches, state, tmp_path, monkeypatch, before, after
):
    file = tmp_path / "score_of_mine.py"
    monkeypatch.syspath_prepend(tmp_path)

    def written(code):
        file.write_text(code)
        linecache.clearcache()
        sys.modules.pop("score_of_mine", None)
        importlib.invalidate_caches()
        return importlib.import_module("score_of_mine").mine

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with pytest.raises(InterruptedError):
        quick(tiny_vit, batches, tolerance=0.02, score=written(CODE), state=state)
    edited = written(CODE.replace(before, after))
    with pytest.raises(SlimvitError, match="another search: its code of the score is"):
        quick(tiny_vit, batches, tolerance=0.02, score=edited, state=state)
    with pytest.raises(InterruptedError):  # the same one goes on to where its calls end
        quick(tiny_vit, batches, tolerance=0.02, score=written(CODE), state=state)


def test_leftovers_of_a_killed_search_go(tiny_vit, batches, state):
    dead = subprocess.Popen(["true"])
    dead.wait()
    state.with_name(f".{state.name}.{dead.pid}.abcd_012").write_bytes(b"half")
    quick(tiny_vit, batches[:1], counts=(12, 12, 9, 9, 5, 1), state=state)
    assert list(state.parent.iterdir()) == []
