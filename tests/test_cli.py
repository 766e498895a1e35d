"""Every command: help, usage, bad input, and errors of one line."""

import contextlib
import errno
import importlib
import json
import os
import subprocess
import sys
from argparse import Namespace

import pytest
import timm
import torch
from commands import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import slimvit
import slimvit.files
from slimvit import Masks
from slimvit.cli import COMMANDS, common, main


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
        ("prune", "counts", "17x1000000000000000000000", "whole numbers"),
        ("prune", "counts", "5,5,", ">= 1 that do not grow (111x7 for seven times 111), got"),
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
    refused(call(command, json=".."), 2, "--json must be a file, got the folder")
    if command != "validate":
        missing = call(command, output="no/x.safetensors")
        refused(missing, 2, "--output no/x.safetensors", f"{out}/no does not exist")


def test_options_that_need_each_other(call, room):
    refused(call("prune", tolerance=0.1, cut=0.4), 2, "not allowed with argument")
    refused(call("prune", "--uniform"), 2, "--uniform needs --cut")
    refused(call("prune", weights_output="w.safetensors"), 2, "--weights-output needs --epochs")
    refused(call("prune", precision="bfloat16"), 2, "float32", "bfloat16")
    refused(call("prune", lr=1e-3), 2, "--lr needs --epochs")
    given = call("prune", "--absorb", cut=0.3, granularity=5)
    refused(given, 2, "--granularity has no meaning with --absorb")
    given = call("prune", "--dynamic", masks=room / "masks.safetensors", granularity=5)
    refused(given, 2, "--granularity has no meaning with --masks")
    refused(call("prune", counts="5,4"), 2, "counts must be one for each of 6 blocks, got 2")
    refused(call("finetune", output="x.pth"), 2, ".safetensors", "x.pth")


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"precision": "float32", "amp": "bfloat16"}, "float32 is --amp none, got --amp bfloat16"),
        ({"precision": "bfloat16", "amp": "none"}, "bfloat16 is --amp bfloat16, got --amp none"),
        ({"keep_weight": 1}, "--keep-weight needs a plan that learns, spvit, got static"),
        ({"masks": None, "absorb": 0.3, "frozen_epochs": 1}, "spvit, got absorb"),
        ({"masks": None, "spvit": 0.5, "alpha": 0.5}, "--alpha has no meaning with spvit"),
        ({"masks": None, "spvit": 0.5, "temperature": 2}, "--temperature has no meaning"),
    ],
)
def test_settings_without_effect_are_refused(call, flags, words):
    refused(call("finetune", **flags), 2, words)


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


def test_models_of_one_channel_take_grey_images(room):
    args = Namespace(data_dir=room / "images", subset=None, samples=1, workers=0, batch_size=1)
    model = timm.create_model("test_vit", img_size=64, in_chans=1)
    ((images, _),) = common.load_images(args, model)
    assert images.shape == (1, 1, 64, 64)


def test_random_weights_are_told(call):
    status, _, stderr = call("validate", checkpoint=None)
    assert status == 0 and "the weights are random" in stderr


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
