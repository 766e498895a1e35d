"""Python of the user's own that commands take: planners, and scores of the search."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from slimvit.errors import UsageError

if TYPE_CHECKING:
    from slimvit.search.scores import Score


def load(flag: str, name: str) -> ModuleType:
    """The module of a file FILE.py, which may import its neighbours, or an installed one.

    Raises:
        UsageError: it is not there, another module has its name, or it raises when it is run.
    """
    try:
        return _of_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
    except Exception as error:
        kind = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
        raise UsageError(f"{flag} {name}: {kind}{error}") from error


def load_imports(args: argparse.Namespace) -> None:
    """What --import names.

    Raises:
        UsageError: there is no file with a plan that it could be for, or `load` refuses one.
    """
    if args.imports and args.masks is None:
        raise UsageError("--import needs --masks, whose planner it defines")
    for name in args.imports:
        load("--import", name)


def _of_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise UsageError("there is no such file")
    known = sys.modules.get(path.stem)
    if known is not None:
        if getattr(known, "__file__", None) == str(path):
            return known
        raise UsageError(f"a module of the name {path.stem} is there already: rename the file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[path.stem] = module  # a search that goes on looks for its score there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        sys.path.remove(str(path.parent))
        raise
    return module


def read_score(text: str) -> str | Score:
    """What --score says: a known name, or the plain function of FILE.py:FUNCTION.

    Raises:
        UsageError: it is neither.
    """
    from slimvit.search import SCORES

    if text in SCORES:
        return text
    where, _, name = text.rpartition(":")
    if not where:
        known = ", ".join(SCORES)
        raise UsageError(f"--score must be one of {known}, or FILE.py:FUNCTION, got {text!r}")
    score = getattr(load("--score", where), name, None)
    if not _is_plain(score):
        kind = score.__qualname__ if inspect.isfunction(score) else f"a {type(score).__name__}"
        got = "" if score is None else f", which is {kind}"
        raise UsageError(
            f"--score {text}: {where} has no function {name}{got}: a score is a plain function, "
            "defined by def at the top of its file"
        )
    return score


def _is_plain(score: object) -> bool:
    """Whether it is a function that its own name finds again, as that of no lambda does."""
    if not inspect.isfunction(score):
        return False
    return getattr(sys.modules.get(score.__module__), score.__qualname__, None) is score
