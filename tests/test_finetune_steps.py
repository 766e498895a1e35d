"""Steps of the training loop: their precision, rates, losses and gradients."""

from copy import deepcopy

import pytest
import torch
from tuning import QUICK, same, weights

from slimvit.finetune import Settings, choose_amp, finetune
from slimvit.finetune._optimizer import make_schedule


def test_bfloat16_computes_but_does_not_store(pair, labelled):
    slim, dense = pair
    losses = []
    for amp in ("none", "bfloat16"):
        result = finetune(deepcopy(slim), dense, labelled, epochs=1, **{**QUICK, "amp": amp})
        assert result.report["amp"] == amp
        assert {value.dtype for value in weights(result.model).values()} == {torch.float32}
        losses.append(result.report["epochs"][0]["loss"])
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.3)


def test_auto_mixed_precision_asks_the_hardware(monkeypatch):
    cpu = torch.device("cpu")
    for native in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert choose_amp("auto", cpu) == (torch.bfloat16 if native else None)
    assert choose_amp("none", cpu) is None
    assert choose_amp("float16", cpu) == torch.float16


@pytest.mark.parametrize(("epochs", "warmup"), [(5, 1), (2, 1), (1, 1), (3, 0)])
def test_the_learning_rate_rises_to_what_was_asked_and_falls(epochs, warmup):
    optimizer, steps = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1), 20
    settings = Settings(epochs=epochs, lr=0.1, warmup_epochs=warmup)
    schedule, rates = make_schedule(optimizer, settings, steps), []
    for step in range(epochs * steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step_update(step + 1)
    peak = round(min(warmup, epochs / 2) * steps)
    assert rates[peak] == max(rates) == pytest.approx(0.1)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.02


@torch.no_grad()
def test_training_wants_its_own_gradients(pair, labelled):
    slim, dense = pair
    before = weights(slim)
    finetune(slim, dense, labelled, epochs=1, progress=False)
    assert any(not torch.equal(before[name], value) for name, value in weights(slim).items())


def test_the_first_step_takes_the_rate_that_was_asked(pair, labelled):
    (entry,) = finetune(*pair, labelled[:1], epochs=1, **QUICK).report["epochs"]
    assert entry["lr"] == pytest.approx(QUICK["lr"])


def test_the_loss_is_the_mean_of_the_images(pair, labelled):
    images = torch.cat([images for images, _ in labelled])
    targets = torch.full((len(images),), -1)
    losses = []
    for sizes in ([16, 2], [18]):
        loader = list(zip(images.split(sizes), targets.split(sizes), strict=True))
        result = finetune(deepcopy(pair[0]), pair[1], loader, epochs=1, **QUICK | {"lr": 1e-12})
        losses.append(result.report["epochs"][0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_empty_batch_changes_nothing_but_the_step(pair, labelled):
    slim, dense = pair
    (plain,) = finetune(deepcopy(slim), dense, labelled, epochs=1, **QUICK).report["epochs"]
    labelled[1] = (torch.empty(0), torch.empty(0, dtype=torch.int64))
    unchanged = []

    class Watched(list):
        def __iter__(self):
            for batch in super().__iter__():
                before = weights(slim)
                yield batch
                unchanged.append(same(before, weights(slim)))

    (entry,) = finetune(slim, dense, Watched(labelled), epochs=1, **QUICK).report["epochs"]
    assert unchanged == [False, True, False]
    assert entry["lr"] == plain["lr"] and entry["loss"] == pytest.approx(plain["loss"], rel=0.5)


def test_the_scale_of_float16_goes_on(pair, labelled, tmp_path, monkeypatch):
    scales = []

    class Scaler(torch.amp.GradScaler):
        """Begins so high that each step halves it."""

        def __init__(self, device, enabled):
            super().__init__(device, init_scale=2.0**60, enabled=enabled)

        def update(self):
            super().update()
            scales.append(self.get_scale())

    def stop(entry):
        if entry["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    options = QUICK | {"amp": "float16", "epochs": 2, "output": tmp_path / "slim.safetensors"}
    with pytest.raises(KeyboardInterrupt):
        finetune(deepcopy(pair[0]), pair[1], labelled, on_epoch=stop, **options)
    finetune(*pair, labelled, **options)
    assert scales[3:6] == scales[6:] == [2.0**56, 2.0**55, 2.0**54]
