"""The commands do what they say, one after the other and in two processes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from commands import COUNTS
from safetensors.torch import load_file

from slimvit import Masks


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
    assert 0 < values["paper_gmacs"] < values["gmacs"] < values["dense_gmacs"]
    assert f"  {values['paper_gmacs']:.3f}\n" in stdout
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


def test_finetune_then_validate(call, out):
    status, stdout, stderr = call("finetune", val_subset="0:6", subset="6:20", json="f.json")
    assert (status, stderr) == (0, "")
    assert "epoch 1/1  loss" in stdout
    assert "\nwrote slim.safetensors: give it as --slim-checkpoint with --masks /" in stdout
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
