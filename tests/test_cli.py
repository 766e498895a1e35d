import contextlib
import errno
import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import slimvit
import slimvit.files
from slimvit import Masks, models
from slimvit.cli import COMMANDS, common, main

COUNTS = [17, 11, 11, 9, 7, 1]


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A checkpoint, masks and 20 images of 10 classes; read only."""
    folder = tmp_path_factory.mktemp("room")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=64, num_classes=10).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_file(model.state_dict(), folder / "model.safetensors")
    spec = models.spec(model)
    info = {"model": spec.name, "image_size": spec.image_size}
    Masks.from_counts(COUNTS, spec.grid, spec.prefix, **info).save(folder / "masks.safetensors")
    noise = np.random.default_rng(0)
    for i in range(20):
        path = folder / "images" / f"c{i % 10}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (70, 66, 3), np.uint8)).save(path)
    return folder


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(room, out, capsys):
    """Run a command on the room; (status, stdout, stderr)."""

    def run(command, *extra, **flags):
        common_flags = {
            "model": "test_vit",
            "img_size": 64,
            "num_classes": 10,
            "checkpoint": room / "model.safetensors",
            "data_dir": room / "images",
            "device": "cpu",
            "batch_size": 8,
        }
        if command == "prune":
            common_flags |= {"output": "masks.safetensors"}
        else:
            common_flags |= {"masks": room / "masks.safetensors"}
        if command == "finetune":
            common_flags |= {"output": "slim.safetensors", "epochs": 1, "amp": "none"}
        arguments = [command]
        for name, value in {**common_flags, **flags}.items():
            if value is not None:
                arguments += [f"--{name.replace('_', '-')}", str(value)]
        status = main([*arguments, *extra])
        return status, *capsys.readouterr()

    return run


def refused(result, status, *words):
    """The call ended with `status`, one line on stderr with these words, and no file."""
    code, stdout, stderr = result
    lines = [line for line in stderr.splitlines() if not line.startswith("warning: ")]
    assert code == status, stderr
    assert len(lines) == 1, stderr
    assert lines[0].startswith("slimvit") and ": error: " in lines[0]
    for word in words:
        assert str(word) in lines[0], lines[0]
    assert os.listdir() == []
    assert stdout == ""


def test_help_does_not_import_torch():
    code = (
        "import sys; from slimvit.cli import main; main(['--help']); 'torch' in sys.modules and 1/0"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    module = importlib.import_module(f"slimvit.cli.{name.replace('-', '_')}")
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: slimvit {name}")
    assert COMMANDS[name] == module.HELP


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"slimvit {slimvit.__version__}\n"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["COMMAND", "required"]),
        (["prun"], ["prun", "choose from"]),
        (["--frobnicate"], ["COMMAND"]),
        (["prune"], ["--model", "required"]),
        (["validate", "--model", "x"], ["--data-dir", "required"]),
        (["validate", "--model", "x", "--data-dir", "y"], ["--masks", "--absorb", "required"]),
        (["validate", "--mod", "x"], ["required"]),
    ],
)
def test_wrong_calls(arguments, words, capsys, out):
    refused((main(arguments), *capsys.readouterr()), 2, "--help)", *words)


@pytest.mark.parametrize(
    "command, flag, value, rule",
    [
        ("prune", "tolerance", "0", "> 0"),
        ("prune", "tolerance", "-0.1", "> 0"),
        ("prune", "tolerance", "nan", "finite number > 0"),
        ("prune", "tolerance", "inf", "finite"),
        ("prune", "granularity", "0", ">= 1"),
        ("prune", "granularity", "2.5", "whole number"),
        ("prune", "epochs", "-1", ">= 0"),
        ("prune", "samples", "0", ">= 1"),
        ("prune", "cut", "1", "< 1"),
        ("prune", "speedup", "1", "> 1"),
        ("prune", "counts", "5,6", "do not grow"),
        ("prune", "counts", "5,x", "whole numbers"),
        ("prune", "lr", "0", "> 0"),
        ("prune", "score", "eq7", "eq6"),
        ("prune", "semantics", "keep", "drop"),
        ("prune", "counts", "17x1000000000000000000000", "at most 10000"),
        ("prune", "counts", "17,5x-3", "whole numbers"),
        ("prune", "counts", f"{10**30},1", "whole numbers"),
        ("prune", "cache_gb", "nan", "finite"),
        ("prune", "cache_gb", "1e308", "<= 1e+06"),
        ("prune", "cache_bytes", str(10**30), f"<= {2**50}"),
        ("prune", "seed", str(10**23), "<= 2147483647"),
        ("finetune", "seed", "4294967296", "<= 2147483647"),
        ("prune", "batch_size", "0", ">= 1"),
        ("prune", "workers", "-1", ">= 0"),
        ("prune", "img_size", "x", ">= 1"),
        ("validate", "precision", "int8", "float32"),
        ("validate", "backend", "magic", "torch"),
        ("validate", "subset", "3", "START:STOP"),
        ("finetune", "epochs", "-1", ">= 0"),
        ("finetune", "lr", "nan", "> 0"),
        ("finetune", "alpha", "1.5", "<= 1"),
        ("finetune", "ema_decay", "1", "< 1"),
        ("finetune", "temperature", "0", "> 0"),
        ("finetune", "val_subset", "x:1", "START:STOP"),
    ],
)
def test_numbers_and_choices(call, command, flag, value, rule):
    refused(call(command, **{flag: value}), 2, repr(value), rule, "--help)")


@pytest.mark.parametrize("command", ["prune", "validate", "finetune"])
def test_devices_and_models(call, command):
    refused(call(command, model="resnet_of_mine"), 2, "unknown model 'resnet_of_mine'")
    refused(call(command, device="abacus"), 2, "--device abacus is not available here")
    refused(call(command, device="meta"), 2, "--device meta is not available here")
    if not torch.cuda.is_available():
        refused(call(command, device="cuda"), 2, "--device cuda is not available here")
    refused(call(command, "--pretrained"), 2, "not allowed with argument")


@pytest.mark.parametrize("command", ["prune", "validate", "finetune"])
def test_output_files_are_checked_before_the_work(call, command, out, monkeypatch):
    monkeypatch.setattr(common, "load_model", lambda *_, **__: pytest.fail("work was begun"))
    refused(call(command, json="no/x.json"), 2, "--json no/x.json", f"{out}/no does not exist")
    refused(call(command, json=".."), 2, "--json", "is a folder")
    if command != "validate":
        missing = call(command, output="no/x.safetensors")
        refused(missing, 2, "--output no/x.safetensors", f"{out}/no does not exist")


def test_options_that_need_each_other(call):
    refused(call("prune", tolerance=0.1, cut=0.4), 2, "not allowed with argument")
    refused(call("prune", "--uniform"), 2, "--uniform needs --cut")
    refused(call("prune", weights_output="w.safetensors"), 2, "--weights-output needs --epochs")
    refused(call("prune", precision="bfloat16"), 2, "float32", "bfloat16")
    refused(call("prune", counts="5,4"), 1, "[L, N] = [6, 17]")
    refused(call("finetune", output="x.pth"), 2, ".safetensors", "x.pth")


def test_checkpoints(call, room, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("checkpoints")
    state = load_file(room / "model.safetensors")
    extra, missing, shape = dict(state), dict(state), dict(state)
    extra["neck.weight"] = torch.zeros(1)
    del missing["blocks.3.attn.qkv.bias"]
    shape["head.weight"] = torch.zeros(11, 64)
    for name, tensors in (("extra", extra), ("missing", missing), ("shape", shape)):
        save_file(tensors, elsewhere / f"{name}.safetensors")
    (elsewhere / "text.safetensors").write_text("hello")
    for name, word in (
        ("extra", "neck.weight"),
        ("missing", "blocks.3.attn.qkv.bias"),
        ("shape", "head.weight must be [10, 64], got [11, 64]"),
        ("text", "not a readable checkpoint"),
        ("absent", "not found"),
    ):
        path = elsewhere / f"{name}.safetensors"
        refused(call("prune", checkpoint=path), 1, path, word)
        refused(call("validate", slim_checkpoint=path), 1, path, word)


def test_masks(call, room, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("masks")
    masks = Masks.load(room / "masks.safetensors")
    masks.replace(model="vit_huge").save(elsewhere / "model")
    masks.replace(image_size=(80, 64)).save(elsewhere / "size")
    Masks.from_counts([10, 5, 1], (4, 4)).save(elsewhere / "depth")
    grown, pruned = masks.keep.clone(), masks.keep.clone()
    grown[3, ~grown[2]] = True
    pruned[2:, 0], pruned[-1] = False, pruned[-2]
    with safe_open(room / "masks.safetensors", framework="pt") as file:
        for name, keep in (("grown", grown), ("pruned", pruned)):
            save_file({"keep": keep}, elsewhere / name, file.metadata())
    whole = (room / "masks.safetensors").read_bytes()
    (elsewhere / "truncated").write_bytes(whole[:-20])
    (elsewhere / "text").write_text("hello")
    for command in ("validate", "finetune"):
        for name, word in (
            ("model", "masks are of model vit_huge, got model test_vit"),
            ("size", "masks are of image size (80, 64), the model takes (64, 64)"),
            ("depth", "[L, N] = [6, 17]"),
            ("grown", "masks must be nested: block 4 keeps"),
            ("pruned", "prefix tokens must be kept: block 3 prunes token 0"),
            ("truncated", f"{elsewhere / 'truncated'} is not a readable safetensors file"),
            ("text", f"{elsewhere / 'text'} is not a readable safetensors file"),
            ("absent", f"file not found: {elsewhere / 'absent'}"),
        ):
            refused(call(command, masks=elsewhere / name), 1, word)


@pytest.mark.parametrize("command", ["prune", "validate", "finetune"])
def test_images(call, command, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("images")
    (elsewhere / "empty").mkdir()
    (elsewhere / "map.txt").write_text("c0\nc1\n")
    refused(call(command, data_dir=elsewhere / "none"), 1, elsewhere / "none", "does not exist")
    refused(call(command, data_dir=elsewhere / "empty"), 1, elsewhere / "empty", "no image")
    refused(call(command, subset="30:40"), 1, "subset 30:40", "20 images")
    refused(call(command, class_map=elsewhere / "map.txt"), 1, elsewhere / "map.txt", "folder 'c2'")


def test_validate(call, room, out):
    status, stdout, stderr = call("validate", json="v.json")
    assert (status, stderr) == (0, "")
    values = json.loads((out / "v.json").read_text())
    keys = {"model", "images", "top1", "top5", "dense_top1", "agreement"}
    assert keys | {"gmacs", "dense_gmacs", "cut"} <= set(values)
    assert values["model"] == "test_vit" and values["images"] == 20 and values["skipped"] == 0
    for key in ("top1", "top5", "dense_top1", "agreement"):
        assert 0 <= values[key] <= 100
    assert values["kept"] == COUNTS
    assert values["cut"] == pytest.approx(1 - values["gmacs"] / values["dense_gmacs"])
    assert "test_vit" in stdout and f"{100 * values['cut']:.1f} % fewer MACs" in stdout
    again = call("validate", slim_checkpoint=room / "model.safetensors")
    assert again == (0, stdout, "")


def test_validate_without_labels(call, room, out):
    status, stdout, stderr = call("validate", data_dir=room / "images" / "c0", json="v.json")
    assert status == 0
    assert stderr.count("\n") == 1 and "no top-1 and top-5" in stderr
    values = json.loads((out / "v.json").read_text())
    assert [values[key] for key in ("top1", "top5", "dense_top1")] == [None] * 3
    assert values["agreement"] is not None and values["images"] == 2


def test_validate_skips_a_corrupt_image(call, room, out, tmp_path_factory):
    images = tmp_path_factory.mktemp("some")
    for i in range(6):
        path = room / "images" / f"c{i}" / f"{i}.jpg"
        content = path.read_bytes()
        (images / path.name).write_bytes(content[: len(content) // 2] if i == 3 else content)
    status, _, stderr = call("validate", data_dir=images, json="v.json")
    assert status == 0
    assert str(images / "3.jpg") in stderr and "1 of 6 images skipped" in stderr
    values = json.loads((out / "v.json").read_text())
    assert (values["images"], values["skipped"]) == (5, 1)


def test_random_weights_are_told(call):
    status, _, stderr = call("validate", checkpoint=None)
    assert status == 0 and "the weights are random" in stderr


def test_finetune_then_validate(call, out):
    status, stdout, stderr = call("finetune", val_subset="0:6", subset="6:20", json="f.json")
    assert (status, stderr) == (0, "")
    assert "epoch 1/1  loss" in stdout and "wrote slim.safetensors" in stdout
    values = json.loads((out / "f.json").read_text())
    assert values["images"] == 14 and [e["epoch"] for e in values["epochs"]] == [0, 1]
    assert sorted(os.listdir()) == ["f.json", "slim.safetensors"]
    assert call("validate", slim_checkpoint="slim.safetensors")[0] == 0


def test_finetune_warns(call):
    status, _, stderr = call("finetune", val_subset="0:4", precision="float32", alpha=0.5)
    assert status == 0
    assert "4 images of --val-subset are trained on, too" in stderr


@pytest.mark.parametrize("epochs", [0, 1])
def test_prune_then_validate(call, out, epochs):
    status, stdout, _ = call("prune", tolerance=0.1, epochs=epochs, samples=8, json="p.json")
    assert status == 0
    values = json.loads((out / "p.json").read_text())
    masks = Masks.load(out / "masks.safetensors")
    assert values["kept"] == list(masks.counts) and len(values["errors"]) == 6
    assert 0 < values["cut"] < 1 and values["seconds"] > 0 and values["images"] == 8
    assert masks.model == "test_vit" and masks.tolerance == 0.1
    assert "fewer MACs" in stdout and "wrote masks.safetensors" in stdout
    files = {"masks.safetensors", "p.json"} | ({"masks.weights.safetensors"} if epochs else set())
    assert set(os.listdir()) == files
    _, _, stderr = call("validate", masks="masks.safetensors")
    assert ("--slim-checkpoint is not given" in stderr) == bool(epochs)
    if epochs:
        tuned = {"masks": "masks.safetensors", "slim_checkpoint": "masks.weights.safetensors"}
        assert call("validate", **tuned)[::2] == (0, "")
        assert call("finetune", **tuned)[::2] == (0, "")


@pytest.mark.parametrize(
    "budget", [{"counts": "17,11x2,9,7,1"}, {"cut": 0.3}, {"cut": 0.3, "score": "random"}]
)
def test_prune_to_a_budget(call, out, budget):
    assert call("prune", samples=8, **budget)[0] == 0
    masks = Masks.load(out / "masks.safetensors")
    if "counts" in budget:
        assert masks.counts == tuple(COUNTS)


def test_prune_goes_on_after_ctrl_c(call, out, monkeypatch):
    from slimvit.search.state import State

    assert call("prune", tolerance=0.05, output="whole.safetensors")[0] == 0
    add = State.add

    def stop(self, name, found):
        add(self, name, found)
        if found.layer == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(State, "add", stop)
    status, stdout, stderr = call("prune", tolerance=0.05)
    assert (status, stdout) == (130, "")
    assert stderr.splitlines()[-1] == "slimvit prune: interrupted"
    assert "the same command goes on" in stderr
    assert not (out / "masks.safetensors").exists()
    monkeypatch.undo()
    os.chdir(out)
    assert call("prune", tolerance=0.05)[0] == 0
    whole, resumed = Masks.load("whole.safetensors"), Masks.load("masks.safetensors")
    assert torch.equal(whole.keep, resumed.keep)
    assert set(os.listdir()) == {"whole.safetensors", "masks.safetensors"}


@pytest.mark.parametrize("command", ["prune", "validate", "finetune"])
def test_full_disk(call, command, monkeypatch):
    class Full:
        def __getattr__(self, name):
            return getattr(os, name)

        def fdopen(self, handle, mode):
            os.close(handle)
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(slimvit.files, "os", Full())
    code, _, stderr = call(command, json="x.json")
    name = {"prune": "masks.search", "validate": "x.json", "finetune": "slim"}[command]
    assert code == 1 and os.listdir() == []
    assert name in stderr and "No space left on device" in stderr
    assert len([line for line in stderr.splitlines() if "error" in line]) == 1
    assert "Traceback" not in stderr


@pytest.mark.parametrize("command", ["prune", "validate", "finetune"])
def test_nan_in_the_model(call, room, command, tmp_path_factory):
    state = load_file(room / "model.safetensors")
    state["blocks.2.attn.qkv.weight"][5, 5] = float("nan")
    path = tmp_path_factory.mktemp("nan") / "nan.safetensors"
    save_file(state, path)
    refused(call(command, checkpoint=path, json="x.json"), 1, "finite")


def test_traceback_only_with_debug(call):
    assert "Traceback" not in call("validate", masks="absent")[2]
    code, _, stderr = call("validate", "--debug", masks="absent")
    assert code == 1 and "Traceback" in stderr and "PlanError" in stderr


def test_unexpected_errors_are_one_line(call, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the\nworld\n  ends")

    monkeypatch.setattr(common, "load_model", fail)
    refused(call("validate"), 1, "RuntimeError: the world ends (--debug shows where)")


def test_json_is_finite_and_whole(tmp_path):
    path = tmp_path / "x.json"
    common.write_json(path, {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": None}})
    assert json.loads(path.read_text()) == {"a": None, "b": [1.5, None], "c": {"d": None}}
    with contextlib.suppress(TypeError):
        common.write_json(path, {"a": object()})
    assert json.loads(path.read_text())["b"] == [1.5, None]
    assert os.listdir(tmp_path) == ["x.json"]


def test_table():
    lines = common.table([("a", 1), ("bcd", "23.5 %")], ("name", "x")).splitlines()
    assert lines == ["name       x", "----  ------", "a          1", "bcd   23.5 %"]


@pytest.mark.parametrize("plan", ["", "0.6,0.3"])
def test_two_processes_train_as_one_run(room, out, plan):
    """Both processes of torchrun take part; one writes, and what it writes is whole."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "slimvit", "finetune", "--model", "test_vit", "--img-size", "64"]
    command += ["--num-classes", "10", "--checkpoint", room / "model.safetensors"]
    spvit = ["--spvit", plan, "--frozen-epochs", "0"]
    command += spvit if plan else ["--masks", room / "masks.safetensors"]
    command += ["--data-dir", room / "images"]
    command += ["--val-subset", "0:6", "--subset", "6:20", "-b", "4", "--epochs", "1"]
    command += ["--amp", "none", "--device", "cpu", "--output", "slim.safetensors"]
    command += ["--json", "f.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1") == 1 and done.stdout.count("wrote") == 1
    values = json.loads((out / "f.json").read_text())
    assert [entry["epoch"] for entry in values["epochs"]] == [0, 1]
    written = {"f.json", "slim.safetensors"} | ({"slim.plan.safetensors"} if plan else set())
    assert set(os.listdir()) == written
    dense = load_file(room / "model.safetensors")
    slim = load_file(out / "slim.safetensors")
    assert slim.keys() == dense.keys()
    assert any(not torch.equal(slim[key], dense[key]) for key in dense)
