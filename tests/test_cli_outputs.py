"""What commands write: no file destroys another, and none is lost to what cannot be printed."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from slimvit import Masks
from slimvit.cli import common, main

MODEL = ["--model", "test_vit", "--img-size", "64", "--num-classes", "10"]
DATA = ["--data-dir", "images"]
QUICK = ["--rounds", "1", "--seconds", "0.001", "--threads", "1"]


@pytest.mark.parametrize(
    "command, names",
    [
        ("prune --checkpoint W --output W", "--output --checkpoint"),
        ("prune --class-map W --output W", "--output --class-map"),
        ("prune --epochs 1 --output W --weights-output W", "--weights-output --output"),
        ("prune --epochs 1 --output x --json x.weights.safetensors", "--json --weights-output"),
        (
            "prune --epochs 1 --checkpoint x.weights.safetensors --output x.safetensors",
            "--weights-output --checkpoint",
        ),
        ("prune --output x --json x.search.safetensors", "the state of the search --json"),
        (
            "prune --dynamic --output x --checkpoint x.masks.safetensors",
            "the masks beside --output --checkpoint",
        ),
        ("prune --dynamic --masks W --output W", "--output --masks"),
        ("prune --absorb --cut 0.3 --checkpoint W --output W", "--output --checkpoint"),
        ("finetune --masks m --output W.safetensors --json W.safetensors", "--json --output"),
        ("finetune --masks m --checkpoint W.safetensors --output W.safetensors", "--checkpoint"),
        ("finetune --masks m --slim-checkpoint s.safetensors --output s.safetensors", "--slim-"),
        ("finetune --masks s.plan.safetensors --output s.safetensors", "the plan beside --masks"),
        ("finetune --masks m --output s.safetensors --json s.resume.safetensors", "unfinished run"),
        (
            "finetune --spvit --target-latency 1 --latency-table t --json t --output s.safetensors",
            "--json --latency-table",
        ),
        ("validate --masks m --json m", "--json --masks"),
        ("validate --masks m --slim-checkpoint W --json W", "--json --slim-checkpoint"),
        ("bench --masks m --json b --csv b", "--csv --json"),
        ("latency-table --checkpoint W --json W", "--json --checkpoint"),
        ("show --masks m --output a.png --pyramid a.png", "--pyramid --output"),
        ("show --masks m --image cat.png --output cat.png", "--output --image"),
        ("show --masks m --save m", "--save --masks"),
        ("export --masks m --output m --format onnx", "--output --masks"),
        ("demo --output-dir . --json report.md", "--json report.md"),
    ],
)
def test_no_file_destroys_another(command, names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for work in ("load_model", "read_masks", "device"):
        monkeypatch.setattr(common, work, lambda *_, **__: pytest.fail("work was begun"))
    given = command.split()
    given += MODEL if given[0] != "demo" else []
    given += DATA if given[0] in ("prune", "finetune", "validate") else []
    assert main(given) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and " must be another file than " in line
    assert all(word in line for word in names.split()), line
    assert os.listdir() == []


def test_a_file_is_known_by_any_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("W").write_text("weights")
    Path("folder").mkdir()
    Path("link").symlink_to("W")
    Path("to-be").symlink_to("not-yet")
    for one, other in [
        ("W", "./W"), ("W", "folder/../W"), ("W", f"{tmp_path}/W"), ("W", "link"), ("link", "W"),
        ("to-be", "not-yet"),
    ]:  # fmt: skip
        given = ["latency-table", *MODEL, "--checkpoint", one, "--json", other]
        assert main(given) == 2
        assert f"both are {Path(other)}" in capsys.readouterr().err
    assert Path("W").read_text() == "weights"


def test_devices_and_what_is_there_already_may_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("x").write_text("an earlier run's")
    null, pipe = Path("/dev/null"), Path("pipe")
    args = common.argparse.Namespace(checkpoint=Path("W"), masks=null)
    outputs = {"--a": null, "--b": null, "--c": pipe, "--d": pipe, "--e": Path("x"), "--f": None}
    common.check_outputs(args, outputs)


@pytest.mark.parametrize(
    "command, rule",
    [
        ("prune --output /dev/null", "a file, the state of the search goes beside it, got"),
        ("finetune --masks m --output d.safetensors", "a file, what an unfinished run goes on"),
        ("prune --absorb --cut 0.3 --output /dev/stdout", "another file than where results are"),
        ("export --masks m --format onnx --output /dev/stderr", "another file than where results"),
        ("show --masks m --save /proc/self/fd/1", "another file than where results are printed"),
    ],
)
def test_devices_that_would_lose_what_is_written(command, rule, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("d.safetensors").symlink_to("/dev/null")
    for work in ("load_model", "read_masks", "device"):
        monkeypatch.setattr(common, work, lambda *_, **__: pytest.fail("work was begun"))
    given = [*command.split(), *MODEL, *(DATA if command.startswith(("prune", "finetune")) else [])]
    assert main(given) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and f" must be {rule}" in line
    assert os.listdir() == ["d.safetensors"]


PRINTING = """
import argparse, pathlib, sys
from slimvit.cli import common
print("before")
name = pathlib.Path(sys.argv[1])
common.check_outputs(argparse.Namespace(), {"--json": name})
with common.then_say("the table"):
    common.write_json(name, {"a": 1})
"""


def test_json_to_a_stdout_that_is_a_file(tmp_path):
    path = tmp_path / "out.txt"
    for name in ("/dev/stdout", path):
        with path.open("w") as out:
            command = [sys.executable, "-c", PRINTING, name]
            done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True)
        if name == path:
            assert "--json must be another file than where results are printed" in done.stderr
        else:
            assert path.read_text() == 'before\n{\n  "a": 1\n}\nthe table\n', done.stderr


@pytest.mark.parametrize(
    "command, key, printed",
    [
        (["bench", *MODEL, *QUICK, "--keep", "9x5,1", "--against", "none"], "batch", "own dense"),
        (["latency-table", *MODEL, *QUICK, "--keep-ratios", "1,0.5"], "rows", "last block"),
        (["doctor"], "auto", "auto takes"),
    ],
)
@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_json_on_stdout_is_alone_there(tmp_path, monkeypatch, capfd, command, key, printed, name):
    monkeypatch.chdir(tmp_path)
    on_cpu = ["--device", "cpu"] if "--rounds" in command else []
    assert main([*command, *on_cpu, "--json", name]) == 0
    out, err = capfd.readouterr()
    assert key in json.loads(out) and printed in err
    assert os.listdir() == []


@pytest.mark.parametrize("full, kept", [("--json", "--csv"), ("--csv", "--json")])
def test_one_file_that_cannot_be_written_costs_no_other(tmp_path, capsys, full, kept):
    given = ["bench", *MODEL, *QUICK, "--keep", "9x5,1", "--against", "none", "--device", "cpu"]
    assert main([*given, full, "/dev/full", kept, str(tmp_path / "kept")]) == 1
    captured = capsys.readouterr()
    assert "/dev/full: No space left on device" in captured.err
    assert "slim / own dense" in captured.out
    assert (tmp_path / "kept").stat().st_size > 0


def call_with_full_stdout(*arguments):
    with open("/dev/full", "w") as full, contextlib.redirect_stdout(full):
        return main([*arguments])


@pytest.mark.parametrize(
    "command, files",
    [
        (["prune", *DATA, "--cut", "0.3", "--output", "m"], ["m"]),
        (["prune", *DATA, "--absorb", "--cut", "0.3", "--output", "m"], ["m"]),
        (["prune", *DATA, "--dynamic", "--masks", "masks", "--output", "m"], ["m"]),
        (["validate", *DATA, "--absorb", "0.3"], []),
        (["latency-table", *QUICK, "--keep-ratios", "1,0.5"], []),
        (["bench", *QUICK, "--absorb", "0.3", "--against", "none", "--csv", "b"], ["b"]),
    ],
)
def test_files_are_written_before_anything_is_printed(prune, capsys, command, files):
    Masks.from_counts((17, 11, 11, 9, 7, 1), (4, 4)).save("masks")
    given = [*MODEL, "--checkpoint", "model.safetensors", "--device", "cpu", "--json", "x.json"]
    assert call_with_full_stdout(*command, *given) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert json.loads(Path("x.json").read_text())
    assert all(Path(name).stat().st_size > 0 for name in files)


def test_a_full_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "slimvit", "doctor"], stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 1
    assert done.stderr == b"slimvit doctor: error: No space left on device\n"


def test_show_writes_before_it_prints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Masks.from_counts((17, 1), (4, 4)).save("masks")
    assert call_with_full_stdout("show", "--masks", "masks", "--pyramid", "p.png") == 1
    assert Path("p.png").stat().st_size > 0


def test_what_cannot_be_written_is_printed(capsys):
    with pytest.raises(OSError, match="full"), common.then_say("the table"):
        raise OSError("full")
    assert capsys.readouterr().out == "the table\n"


def test_names_of_any_bytes(prune):
    name = os.fsdecode(b"p\xff.safetensors")
    status, out, _ = prune("--counts", "17,11x4,1", "--output", name, "--json", "p.json")
    assert status == 0 and "wrote p\\udcff.safetensors" in out
    assert os.fsencode(json.loads(Path("p.json").read_text())["output"]) == b"p\xff.safetensors"
    common.write_json("u.json", {"name": "grün"})
    assert "grün" in Path("u.json").read_text(encoding="utf-8")


def test_a_device_in_a_folder_that_is_not_writable(monkeypatch):
    writable = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: str(path) != "/dev" and writable(path, mode)
    )
    common.check_output("--json", Path("/dev/null"))


def test_the_command_export_takes_tuned_weights(tiny_vit, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file(tiny_vit.state_dict(), "m.weights.safetensors")
    Masks.from_counts((12, 9, 9, 5, 5, 1), (4, 4)).save("m.safetensors")
    given = ["export", *MODEL, "--output", "slim.pt2"]
    assert main([*given, "--slim-checkpoint", "m.weights.safetensors"]) == 2
    assert "--slim-checkpoint needs --masks or --absorb" in capsys.readouterr().err
    given += ["--masks", "m.safetensors"]
    assert main(given) == 0
    assert "there are tuned weights: m.weights.safetensors" in capsys.readouterr().err
    assert main([*given, "--slim-checkpoint", "m.weights.safetensors"]) == 0
    assert capsys.readouterr().err == ""
    exported = torch.export.load("slim.pt2").module().state_dict()
    assert torch.equal(exported["head.weight"], tiny_vit.head.weight)
