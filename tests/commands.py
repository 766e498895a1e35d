"""The commands as tests call them: a small model, images and masks, and what a refusal is."""

import os

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from slimvit import Masks, models
from slimvit.cli import main

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
