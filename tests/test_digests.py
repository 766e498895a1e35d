"""Digests of code: what counts to a function's or a class's source, and what does not."""

import functools
import importlib
import linecache
import struct

import pytest
import torch

from slimvit.digests import code_digest, content
from slimvit.search import scores

CODE = """
import functools
FACTOR = 2

def near(view):
    return FACTOR

@functools.wraps(near)
def wrapped(*given):
    return near(*given)

class Rule:
    def choose(self):
        return FACTOR
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The module of some code, written to one file; imported anew each time."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(code):
        (tmp_path / "digested.py").write_text(code)
        linecache.clearcache()
        importlib.invalidate_caches()
        monkeypatch.delitem(importlib.sys.modules, "digested", raising=False)
        return importlib.import_module("digested")

    monkeypatch.setattr(importlib.sys, "dont_write_bytecode", True)
    return write


@pytest.mark.parametrize("name", ["near", "wrapped", "Rule"])
def test_the_whole_file_counts(written, name):
    first, again, edited = (
        code_digest(getattr(written(code), name))
        for code in (CODE, CODE, CODE.replace("FACTOR = 2", "FACTOR = 3"))
    )
    assert first == again != edited
    assert first and edited


def test_a_decorator_of_another_file_hides_nothing(written):
    def of(code):
        return code_digest(functools.lru_cache(written(code).near))

    assert of(CODE) == of(CODE) != of(CODE.replace("FACTOR = 2", "FACTOR = 3"))


def test_a_notebooks_cells_count_by_themselves(monkeypatch):
    """Their code is in no file; linecache knows it by the cell's name."""

    def cell(factor):
        lines = f"class Rule:\n    def choose(self):\n        return {factor}\n"
        name, space = f"<cell {factor}>", {"__name__": "no_module_of_this_name"}
        monkeypatch.setitem(
            linecache.cache, name, (len(lines), None, [*lines.splitlines(True)], name)
        )
        exec(compile(lines, name, "exec"), space)
        return space["Rule"]

    for of in (lambda rule: rule, lambda rule: rule.choose):
        assert code_digest(of(cell(1))) == code_digest(of(cell(1))) != code_digest(of(cell(2)))


def test_slimvits_own_count_by_themselves():
    assert code_digest(scores.eq6) != code_digest(scores.attention)


def test_what_has_no_source_has_no_digest():
    assert code_digest(len) == code_digest(int) == code_digest() == ""


@pytest.mark.parametrize(
    "value",
    [
        torch._neg_view(torch.tensor([-1.5, 2.0])),
        torch.tensor([1.5, 0, -2.0, 0])[::2],
        torch.tensor([[1.5], [-2.0]]).t(),
        torch.complex(torch.tensor(1.5), torch.tensor(2.0)).conj(),
        torch.tensor([1.5, -2.0]).requires_grad_(),
    ],
    ids=["negative", "strided", "transposed", "conjugate", "gradient"],
)
def test_content_is_what_the_numbers_are(value):
    assert content(value).tobytes() == struct.pack("2f", 1.5, -2.0)
