"""Commands take scores and planners of the user's own from Python files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import slimvit
from slimvit import Planner, load_plan
from slimvit.cli import main
from slimvit.masks import Masks

SCORE = """
import functools
import own_numbers  # a neighbour

def of_inputs(view):
    return view.inputs.square().sum(-1) * own_numbers.FACTOR

LARGE = 3

def made(power):
    def score(view):
        return of_inputs(view) ** power
    return score

class Norms:
    def __call__(self, view):
        return of_inputs(view)

    def score(view):
        return of_inputs(view)

squares = made(2)
norms = Norms()
bound = norms.__call__
inputs = lambda view: of_inputs(view)
part = functools.partial(made, 2)
"""
PLANNER = """
import slimvit

class Largest(slimvit.Planner):
    kind = "own-planner"

    def choose(self, layer, view, n):
        return view.top(view.alive.x.norm(dim=-1).t(), n)
"""
COUNTS = [17, 12, 9, 7, 5, 1]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What a test imports is not there for the next."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(Planner, "kinds", dict(Planner.kinds))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]


@pytest.fixture
def command(prune, tmp_path):
    """`slimvit prune` in a folder with a score in own_score.py, a planner in own_planner.py."""
    Path("own_score.py").write_text(SCORE)
    Path("own_numbers.py").write_text("FACTOR = 2.0\n")
    Path("own_planner.py").write_text(PLANNER)
    return prune


def found(name="plan.safetensors"):
    return Masks.load(name).keep


def test_a_score_of_ones_own(command, capsys):
    budget = ["--counts", "17,12,9,7,5,1"]
    assert command(*budget, "--score", "own_score.py:of_inputs", "--json", "r.json")[0] == 0
    mine = found()
    values = json.loads(Path("r.json").read_text())
    assert values["options"]["score"] == "own_score.py:of_inputs"
    assert command(*budget)[0] == 0
    assert not torch.equal(found(), mine)
    Path("plain").mkdir()
    Path("plain/own_plain.py").write_text(
        "def of_inputs(view):\n    return view.inputs.square().sum(-1)\n"
    )
    assert command(*budget, "--score", "plain/own_plain.py:of_inputs")[0] == 0
    assert torch.equal(found(), mine)  # a factor changes no ranking


def test_an_edited_score_does_not_go_on(command, monkeypatch):
    """A search that was stopped knows its score again, and one that was edited as another."""
    budget = ["--counts", "17,12,9,7,5,1", "--score", "own_score.py:of_inputs"]

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Masks, "save", stopped)
        assert command(*budget)[0] == 130
    assert Path("plan.search.safetensors").exists()
    del sys.modules["own_score"]
    Path("own_score.py").write_text(SCORE.replace("square", "abs"))
    status, _, err = command(*budget)
    assert status != 0 and "score" in err
    del sys.modules["own_score"]
    Path("own_score.py").write_text(SCORE)
    assert command(*budget)[0] == 0


def test_a_dps_learns_it(command):
    Masks.from_counts(COUNTS, (4, 4)).save("masks.safetensors")
    options = ["--dynamic", "--masks", "masks.safetensors", "--score", "own_score.py:of_inputs"]
    status, _, err = command(*options, "--predictor-epochs", "1", "--json", "r.json")
    assert status == 0, err
    assert load_plan("plan.safetensors").kind == "dps"
    options = json.loads(Path("r.json").read_text())["options"]
    assert options["score"] == "own_score.py:of_inputs"


def test_a_planner_of_ones_own(command, capsys):
    model = ["--model", "test_vit", "--img-size", "64", "--num-classes", "10"]
    given = [*model, "--checkpoint", "model.safetensors", "--masks", "largest.safetensors"]
    code = "import own_planner; own_planner.Largest(counts=%s).save('largest.safetensors')"
    slimvit_folder = str(Path(slimvit.__file__).parent.parent)
    subprocess.run(
        [sys.executable, "-c", code % COUNTS], check=True, env={"PYTHONPATH": f".:{slimvit_folder}"}
    )
    data = ["--data-dir", "images", "--device", "cpu"]
    assert main(["validate", *given, *data]) == 1
    assert "known once the module that defines it is imported" in capsys.readouterr().err
    assert main(["validate", *given, *data, "--import", "own_planner.py"]) == 0
    assert "own-planner" in capsys.readouterr().out
    assert main(["export", *model, "--output", "dense.onnx", "--import", "own_planner.py"]) == 2
    assert "--import needs --masks" in capsys.readouterr().err
    quick = ["--rounds", "1", "--seconds", "0.001", "--threads", "1", "--against", "none"]
    assert main(["bench", *given, *quick, "--import", "own_planner.py"]) == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("norms", "a Norms"),
        ("bound", "a method"),
        ("Norms", "a type"),
        ("inputs", "<lambda>"),
        ("squares", "made.<locals>.score"),
        ("part", "a partial"),
        ("Norms.score", None),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_score_is_a_plain_function(command, name, kind, dynamic):
    status, _, err = command("--score", f"own_score.py:{name}", *["--dynamic"] * dynamic)
    got = f", which is {kind}" if kind else ""
    assert err == (
        f"slimvit prune: error: --score own_score.py:{name}: own_score.py has no function {name}"
        f"{got}: a score is a plain function, defined by def at the top of its file "
        "(see slimvit prune --help)\n"
    )
    assert status == 2
    assert not list(Path().glob("plan*"))


def test_a_score_may_be_a_neighbours_and_decorated(command):
    Path("own_other.py").write_text(
        "import torch\nfrom own_score import of_inputs\n"
        "@torch.no_grad()\ndef mine(view):\n    return of_inputs(view)\n"
    )
    for name in ("of_inputs", "mine"):
        assert command("--score", f"own_other.py:{name}", "--counts", "17,12,9,7,5,1")[0] == 0


def test_a_score_that_fails_leaves_no_state_behind(command):
    """Or the corrected one would be that of another search."""
    Path("own_wrong.py").write_text("def f(view):\n    return view.nothing\n")
    status, _, err = command("--score", "own_wrong.py:f")
    assert status == 1 and "has no attribute 'nothing'" in err
    assert not list(Path().glob("plan*"))
    assert command("--score", "own_score.py:of_inputs")[0] == 0


@pytest.mark.parametrize(
    "score, message",
    [
        (
            "norms",
            "--score must be one of eq6, attention, random, or FILE.py:FUNCTION, got 'norms'",
        ),
        ("own_score.py", "--score must be one of eq6, attention, random, or FILE.py:FUNCTION"),
        ("own_score.py:none", "own_score.py has no function none"),
        ("own_score.py:LARGE", "own_score.py has no function LARGE"),
        ("own_score.py:of_inputs --json own_score.py", "--json must be another file than --score"),
        ("own_none.py:f", "--score own_none.py: there is no such file"),
        ("no.such.module:f", "--score no.such.module: ModuleNotFoundError"),
        ("own_broken.py:f", "--score own_broken.py: ZeroDivisionError: division by zero"),
        ("json.py:f", "a module of the name json is there already: rename the file"),
    ],
)
def test_what_is_no_score_is_refused(command, score, message):
    Path("own_broken.py").write_text("1 / 0\n")
    Path("json.py").write_text("f = print\n")
    path = list(sys.path)
    status, _, err = command("--score", *score.split())
    assert status == 2 and message in err
    assert sys.path == path or score.startswith("own_score")
    assert "own_broken" not in sys.modules
    assert not Path("plan.safetensors").exists()
