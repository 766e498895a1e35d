"""The training loop: what it learns, how it goes on after a kill, and what it refuses."""

import contextlib
import errno
import json
import math
import random
import signal
from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tuning import QUICK, same, weights

from slimvit import Masks, apply_masks, models
from slimvit.cli import main
from slimvit.errors import CheckpointError, SlimvitError
from slimvit.finetune import _run, distillation_loss, finetune
from slimvit.finetune import _state as state


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_loss_is_the_formula(temperature, alpha):
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    targets = torch.tensor([1, -1, 3, 0, -1])
    p = (teacher / temperature).softmax(-1)
    q = (student / temperature).softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean() * temperature**2
    labels = F.cross_entropy(student[[0, 2, 3]], targets[[0, 2, 3]])
    loss = distillation_loss(student, teacher, targets, temperature=temperature, alpha=alpha)
    torch.testing.assert_close(loss, (1 - alpha) * kl + alpha * labels)


def test_loss_without_labels_is_distillation_alone():
    logits = torch.randn(2, 4, 7)
    none = torch.full((4,), -1)
    first = distillation_loss(*logits, none, temperature=1.0, alpha=0.9)
    assert first == distillation_loss(*logits, none, temperature=1.0, alpha=0.0)


def test_learns_to_agree_and_leaves_the_dense_model_alone(pair, labelled):
    slim, dense = pair
    before = weights(dense)
    entries = []
    result = finetune(
        slim, dense, labelled, epochs=6, val_loader=labelled, on_epoch=entries.append, **QUICK
    )
    assert same(before, weights(dense))
    assert result.model is slim and not slim.training
    log = result.report["epochs"]
    assert log == entries and [entry["epoch"] for entry in log] == list(range(7))
    assert log[-1]["loss"] < 0.5 * log[1]["loss"]
    assert log[-1]["agreement"] > log[0]["agreement"] - 6  # an image of 18 may turn
    assert math.isclose(log[-1]["lr"], 1e-3 * 0.01, rel_tol=0.9)
    json.dumps(result.report, allow_nan=False)


@pytest.mark.parametrize("fails", [False, True])
def test_models_and_generators_are_left_as_promised(pair, labelled, fails):
    slim, dense = pair
    dense.train().blocks[2].eval()
    modes = [module.training for module in dense.modules()]

    def stop(_):
        assert not any(module.training for module in dense.modules())
        if fails:
            raise KeyboardInterrupt

    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    wanted = drawn()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with pytest.raises(KeyboardInterrupt) if fails else contextlib.nullcontext():
        finetune(slim, dense, labelled, epochs=1, on_epoch=stop, **QUICK)
    assert drawn() == wanted
    assert modes == [module.training for module in dense.modules()]
    assert not any(module.training for module in slim.modules())


def test_output_loads_in_plain_timm(pair, labelled, tmp_path):
    slim, dense = pair
    output = tmp_path / "slim.safetensors"
    finetune(slim, dense, labelled, epochs=1, output=output, info={"model": "test_vit"}, **QUICK)
    model = timm.create_model("test_vit", img_size=64, num_classes=10, checkpoint_path=str(output))
    assert same(weights(model), weights(slim))
    with safe_open(output, framework="pt") as file:
        assert json.loads(file.metadata()["slimvit"]) == {"model": "test_vit", "epochs": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["slim.safetensors"]


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_goes_on_after_ctrl_c_as_if_nothing_had_happened(pair, labelled, tmp_path, ema_decay):
    slim, dense = pair
    options = {"epochs": 4, "ema_decay": ema_decay, **QUICK}
    whole = finetune(deepcopy(slim), dense, labelled, **options)

    def stop(entry):
        if entry["epoch"] == 3:
            raise KeyboardInterrupt

    output = tmp_path / "slim.safetensors"
    with pytest.raises(KeyboardInterrupt):
        again = deepcopy(slim)
        finetune(again, dense, labelled, output=output, on_epoch=stop, **options)
    assert state.resume_path(output).exists()
    with safe_open(output, framework="pt") as file:
        assert json.loads(file.metadata()["slimvit"])["epochs"] == 2
    result = finetune(deepcopy(slim), dense, labelled, output=output, **options)
    assert result.report["resumed"] == 2
    assert [entry["epoch"] for entry in result.report["epochs"]] == [1, 2, 3, 4]
    assert same(weights(result.model), weights(whole.model))
    assert same(load_file(output), weights(whole.model))
    assert not state.resume_path(output).exists()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_an_epoch_is_saved_waits_for_all_its_files(
    pair, labelled, tmp_path, monkeypatch, capsys, number
):
    """What the message says is saved is what the next call goes on from."""
    save_resume = _run.save_resume

    def stop(*given):
        signal.raise_signal(number)
        save_resume(*given)

    output = tmp_path / "slim.safetensors"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_run, "save_resume", stop)
        finetune(deepcopy(pair[0]), pair[1], labelled, epochs=2, output=output, **QUICK)
    assert f"stopped: {output} holds epoch 1; the same call goes on" in capsys.readouterr().err
    result = finetune(*pair, labelled, epochs=2, output=output, **QUICK)
    assert result.report["resumed"] == 1


@pytest.fixture
def stopped(pair, labelled, tmp_path):
    """A run stopped in its second epoch: its output."""
    slim, dense = pair

    def stop(entry):
        if entry["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(
            deepcopy(slim), dense, labelled, epochs=2, on_epoch=stop,
            output=tmp_path / "slim.safetensors", **QUICK,
        )  # fmt: skip
    return tmp_path / "slim.safetensors"


def test_a_run_with_other_settings_does_not_go_on(pair, labelled, stopped):
    slim, dense = pair
    options = {"output": stopped, **QUICK}
    with pytest.raises(CheckpointError, match="run with other epochs: delete it, or .*restart"):
        finetune(slim, dense, labelled, epochs=3, **options)
    with pytest.raises(CheckpointError, match="run with other clip, info's model: delete it"):
        finetune(slim, dense, labelled, epochs=2, clip=2.0, info={"model": "x"}, **options)
    for masks in (
        Masks.from_counts([17, 9, 9, 9, 5, 1], (4, 4)),
        slim.masks.replace(semantics="idle"),
    ):
        with pytest.raises(CheckpointError, match="run with other masks: delete it"):
            finetune(apply_masks(dense, masks), dense, labelled, epochs=2, **options)
    with pytest.raises(CheckpointError, match="run with other weights: delete it"):
        changed = deepcopy(slim)
        changed.head.bias.data[0] += 1
        finetune(changed, dense, labelled, epochs=2, **options)
    result = finetune(slim, dense, labelled, epochs=3, restart=True, **options)
    assert result.report["resumed"] == 0 and len(result.report["epochs"]) == 3


@pytest.mark.parametrize("damage", ["truncated", "other file"])
def test_a_damaged_resume_file_is_refused(pair, labelled, stopped, damage):
    path = state.resume_path(stopped)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=f"{path}.*delete it"):
        finetune(*pair, labelled, epochs=2, output=stopped, **QUICK)


def test_average_of_the_weights(pair, labelled):
    slim, dense = pair
    result = finetune(slim, dense, labelled, epochs=2, ema_decay=0.99, **QUICK)
    assert result.model is not slim and result.model.masks.counts == slim.masks.counts
    assert not same(weights(result.model), weights(slim))


def test_the_decay_of_the_average_rises_to_what_was_asked(pair, labelled, capsys):
    """The third update has at most 1 - 3^(-2/3) = 0.52, the sixth 0.70."""
    slim, dense = pair
    for decay, epochs, alike in ((0.6, 1, True), (0.5, 1, False), (0.6, 2, False)):
        found = [
            finetune(deepcopy(slim), dense, labelled, epochs=epochs, ema_decay=of, **QUICK).model
            for of in (decay, 0.99)
        ]
        assert same(weights(found[0]), weights(found[1])) == alike
    assert main(["finetune", "--help"]) == 0
    assert "with a decay that rises to this one" in " ".join(capsys.readouterr().out.split())


def test_no_epochs_write_the_weights_as_they_are(pair, labelled, tmp_path):
    slim, dense = pair
    output = tmp_path / "slim.safetensors"
    result = finetune(slim, dense, labelled, epochs=0, output=output, **QUICK)
    assert same(load_file(output), weights(dense)) and result.report["epochs"] == []


@pytest.mark.parametrize("what", ["images", "weights"])
def test_nan_is_one_error_and_nothing_is_written(pair, labelled, tmp_path, what):
    slim, dense = pair
    if what == "images":
        labelled[1][0][0, 0, 0, 0] = float("nan")
    else:
        slim.blocks[2].attn.proj.weight.data[0, 0] = float("nan")
    with pytest.raises(SlimvitError, match=r"the loss is not finite in epoch 1, step \d"):
        finetune(slim, dense, labelled, epochs=1, output=tmp_path / "slim.safetensors", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_epoch_before(pair, labelled, tmp_path, monkeypatch):
    output = tmp_path / "slim.safetensors"
    write, calls = state.atomic_write, []

    def full(path, content):
        calls.append(path)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(state, "atomic_write", full)
    with pytest.raises(OSError, match="No space left on device.*slim.safetensors"):
        finetune(*pair, labelled, epochs=3, output=output, **QUICK)
    with safe_open(output, framework="pt") as file:
        assert json.loads(file.metadata()["slimvit"])["epochs"] == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_features_are_learned_where_there_are_no_classes(pair, labelled):
    slim, dense = pair
    for model in (slim, dense):
        model.reset_classifier(0)
    log = finetune(slim, dense, labelled, epochs=3, **QUICK).report["epochs"]
    assert log[-1]["loss"] < log[0]["loss"] < 4


def test_a_distilled_model_that_trains_both_heads():
    torch.manual_seed(0)
    dense = timm.create_model(
        "deit_tiny_distilled_patch16_224",
        **{"img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7},
    )
    spec = models.spec(dense)
    slim = apply_masks(dense, Masks.from_counts([6, 4, 2], spec.grid, spec.prefix))
    slim.set_distilled_training()
    images = [(torch.randn(4, 3, 32, 32), torch.randint(7, (4,)))]
    finetune(slim, dense, images, epochs=1, **QUICK)
    assert all(value.isfinite().all() for value in slim.state_dict().values())
