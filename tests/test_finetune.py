import contextlib
import errno
import json
import math
import random
from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from slimvit import (
    DPS,
    Absorb,
    Masks,
    Planner,
    SPViT,
    accelerate,
    apply_masks,
    load_plan,
    models,
)
from slimvit.dynamic import Static
from slimvit.errors import CheckpointError, DataError, PlanError, SlimvitError, UsageError
from slimvit.finetune import (
    Settings,
    choose_amp,
    class_loss,
    distillation_loss,
    finetune,
    keep_loss,
    plan_path,
    spvit_settings,
    timm_weights,
    token_loss,
)
from slimvit.finetune import _state as state
from slimvit.finetune._optimizer import make_schedule

QUICK = {"lr": 1e-3, "amp": "none", "progress": False, "warmup_epochs": 0}


@pytest.fixture
def pair(tiny_vit):
    """A dense model and its slim copy, ready to train."""
    spec = models.spec(tiny_vit)
    masks = Masks.from_counts([17, 9, 9, 7, 5, 1], spec.grid, spec.prefix)
    return apply_masks(tiny_vit, masks), tiny_vit


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [(torch.randn(6, 3, 64, 64), torch.randint(10, (6,))) for _ in range(3)]


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


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


def test_learns_to_agree_and_leaves_the_dense_model_alone(pair, batches):
    slim, dense = pair
    before = weights(dense)
    entries = []
    result = finetune(
        slim, dense, batches, epochs=6, val_loader=batches, on_epoch=entries.append, **QUICK
    )
    assert same(before, weights(dense))
    assert result.model is slim and not slim.training
    log = result.report["epochs"]
    assert log == entries and [entry["epoch"] for entry in log] == list(range(7))
    assert log[-1]["loss"] < 0.5 * log[1]["loss"]
    assert log[-1]["agreement"] >= log[0]["agreement"]
    assert math.isclose(log[-1]["lr"], 1e-3 * 0.01, rel_tol=0.9)
    json.dumps(result.report, allow_nan=False)


@pytest.mark.parametrize("fails", [False, True])
def test_the_teacher_and_the_generators_are_as_they_were(pair, batches, fails):
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
        finetune(slim, dense, batches, epochs=1, on_epoch=stop, **QUICK)
    assert drawn() == wanted
    assert modes == [module.training for module in dense.modules()]


def test_output_loads_in_plain_timm(pair, batches, tmp_path):
    slim, dense = pair
    output = tmp_path / "slim.safetensors"
    finetune(slim, dense, batches, epochs=1, output=output, info={"model": "test_vit"}, **QUICK)
    model = timm.create_model("test_vit", img_size=64, num_classes=10, checkpoint_path=str(output))
    assert same(weights(model), weights(slim))
    with safe_open(output, framework="pt") as file:
        assert json.loads(file.metadata()["slimvit"]) == {"model": "test_vit", "epochs": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["slim.safetensors"]


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_goes_on_after_ctrl_c_as_if_nothing_had_happened(pair, batches, tmp_path, ema_decay):
    slim, dense = pair
    options = {"epochs": 4, "ema_decay": ema_decay, **QUICK}
    whole = finetune(deepcopy(slim), dense, batches, **options)

    def stop(entry):
        if entry["epoch"] == 3:
            raise KeyboardInterrupt

    output = tmp_path / "slim.safetensors"
    with pytest.raises(KeyboardInterrupt):
        again = deepcopy(slim)
        finetune(again, dense, batches, output=output, on_epoch=stop, **options)
    assert state.resume_path(output).exists()
    with safe_open(output, framework="pt") as file:
        assert json.loads(file.metadata()["slimvit"])["epochs"] == 2
    result = finetune(deepcopy(slim), dense, batches, output=output, **options)
    assert result.report["resumed"] == 2
    assert [entry["epoch"] for entry in result.report["epochs"]] == [1, 2, 3, 4]
    assert same(weights(result.model), weights(whole.model))
    assert same(load_file(output), weights(whole.model))
    assert not state.resume_path(output).exists()


@pytest.fixture
def stopped(pair, batches, tmp_path):
    """A run stopped in its second epoch: its output."""
    slim, dense = pair

    def stop(entry):
        if entry["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(
            deepcopy(slim), dense, batches, epochs=2, on_epoch=stop,
            output=tmp_path / "slim.safetensors", **QUICK,
        )  # fmt: skip
    return tmp_path / "slim.safetensors"


def test_a_run_with_other_settings_does_not_go_on(pair, batches, stopped):
    slim, dense = pair
    options = {"output": stopped, **QUICK}
    with pytest.raises(CheckpointError, match="run with other settings: delete it, or .*restart"):
        finetune(slim, dense, batches, epochs=3, **options)
    with pytest.raises(CheckpointError, match="other settings"):
        finetune(slim, dense, batches, epochs=2, info={"model": "x"}, **options)
    result = finetune(slim, dense, batches, epochs=3, restart=True, **options)
    assert result.report["resumed"] == 0 and len(result.report["epochs"]) == 3


@pytest.mark.parametrize("damage", ["truncated", "other file"])
def test_a_damaged_resume_file_is_refused(pair, batches, stopped, damage):
    path = state.resume_path(stopped)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=f"{path}.*delete it"):
        finetune(*pair, batches, epochs=2, output=stopped, **QUICK)


def test_average_of_the_weights(pair, batches):
    slim, dense = pair
    result = finetune(slim, dense, batches, epochs=2, ema_decay=0.99, **QUICK)
    assert result.model is not slim and result.model.masks.counts == slim.masks.counts
    assert not same(weights(result.model), weights(slim))


def test_no_epochs_write_the_weights_as_they_are(pair, batches, tmp_path):
    slim, dense = pair
    output = tmp_path / "slim.safetensors"
    result = finetune(slim, dense, batches, epochs=0, output=output, **QUICK)
    assert same(load_file(output), weights(dense)) and result.report["epochs"] == []


@pytest.mark.parametrize("what", ["images", "weights"])
def test_nan_is_one_error_and_nothing_is_written(pair, batches, tmp_path, what):
    slim, dense = pair
    if what == "images":
        batches[1][0][0, 0, 0, 0] = float("nan")
    else:
        slim.blocks[2].attn.proj.weight.data[0, 0] = float("nan")
    with pytest.raises(SlimvitError, match=r"the loss is not finite in epoch 1, step \d"):
        finetune(slim, dense, batches, epochs=1, output=tmp_path / "slim.safetensors", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_epoch_before(pair, batches, tmp_path, monkeypatch):
    output = tmp_path / "slim.safetensors"
    write, calls = state.atomic_write, []

    def full(path, content):
        calls.append(path)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(state, "atomic_write", full)
    with pytest.raises(OSError, match="No space left on device.*slim.safetensors"):
        finetune(*pair, batches, epochs=3, output=output, **QUICK)
    with safe_open(output, framework="pt") as file:
        assert json.loads(file.metadata()["slimvit"])["epochs"] == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_bfloat16_computes_but_does_not_store(pair, batches):
    slim, dense = pair
    losses = []
    for amp in ("none", "bfloat16"):
        result = finetune(deepcopy(slim), dense, batches, epochs=1, **{**QUICK, "amp": amp})
        assert result.report["amp"] == amp
        assert {value.dtype for value in weights(result.model).values()} == {torch.float32}
        losses.append(result.report["epochs"][0]["loss"])
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.3)


def test_features_are_learned_where_there_are_no_classes(pair, batches):
    slim, dense = pair
    for model in (slim, dense):
        model.reset_classifier(0)
    log = finetune(slim, dense, batches, epochs=3, **QUICK).report["epochs"]
    assert log[-1]["loss"] < log[0]["loss"] < 4


def test_an_empty_batch_changes_nothing_but_the_step(pair, batches):
    batches[0] = (torch.empty(0), torch.empty(0, dtype=torch.int64))
    (entry,) = finetune(*pair, batches, epochs=1, **QUICK).report["epochs"]
    assert math.isfinite(entry["loss"])


def test_auto_mixed_precision_asks_the_hardware(monkeypatch):
    cpu = torch.device("cpu")
    for native in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert choose_amp("auto", cpu) == (torch.bfloat16 if native else None)
    assert choose_amp("none", cpu) is None
    assert choose_amp("float16", cpu) == torch.float16


@pytest.mark.parametrize(
    "name, value, rule",
    [
        ("epochs", -1, ">= 0"),
        ("lr", 0.0, "> 0"),
        ("lr", float("nan"), "> 0"),
        ("lr", float("inf"), "finite"),
        ("weight_decay", -0.1, ">= 0"),
        ("temperature", 0.0, "> 0"),
        ("alpha", 1.1, r"in \[0, 1\]"),
        ("clip", -1.0, ">= 0"),
        ("amp", "int8", "auto or one of bfloat16, float16, none"),
        ("ema_decay", 1.0, r"in \(0, 1\)"),
        ("keep_weight", -1.0, ">= 0"),
        ("frozen_epochs", -1, ">= 0"),
        ("backbone_rate", float("nan"), ">= 0"),
    ],
)
def test_settings_are_checked(name, value, rule):
    with pytest.raises(UsageError, match=f"{name} must be .*{rule}.*, got {value!r}"):
        Settings(**{name: value})


def test_loader_is_checked(pair, batches):
    with pytest.raises(UsageError, match="must have a length"):
        finetune(*pair, iter(batches), **QUICK)
    with pytest.raises(DataError, match="too few images"):
        finetune(*pair, [], **QUICK)


COUNTS = [17, 13, 9, 9, 6, 1]


class Largest(Planner):
    kind = "test_finetune_largest"

    def choose(self, layer, view, n):
        return view.top(view.alive.x.norm(dim=-1).t(), n)


def plan_of_kind(kind, spec):
    if kind == "absorb":
        return Absorb(counts=COUNTS)
    if kind == "dps":
        return DPS(COUNTS)
    if kind == "static":
        return Static(Masks.from_counts(COUNTS, spec.grid, spec.prefix))
    if kind == "custom":
        return Largest(COUNTS)
    return SPViT((0.7, 0.4), stages=(1, 3))


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("kind", ["absorb", "dps", "static", "custom", "spvit"])
def test_every_plan_is_tuned_and_its_files_load_again(tiny_vit, batches, tmp_path, kind, ema_decay):
    slim = apply_masks(tiny_vit, plan_of_kind(kind, models.spec(tiny_vit)))
    before, output = weights(slim), tmp_path / "slim.safetensors"
    options = {"epochs": 1, "frozen_epochs": 0, "backbone_rate": 1.0, "ema_decay": ema_decay}
    result = finetune(slim, tiny_vit, batches, output=output, **options, **QUICK)
    assert math.isfinite(result.report["epochs"][0]["loss"])
    assert result.report["plan"]["kind"] == slim.plan.kind
    json.dumps(result.report, allow_nan=False)
    changed = {k for k, v in weights(result.model).items() if not torch.equal(v, before[k])}
    assert any(not k.startswith("plan.") for k in changed)
    assert any(k.startswith("plan.") for k in changed) == (kind == "spvit")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"slim.safetensors", "slim.plan.safetensors"}
    dense = models.create("test_vit", checkpoint=output, img_size=64, num_classes=10)
    assert same(weights(dense), timm_weights(result.model))
    again = apply_masks(dense, load_plan(plan_path(output)))
    images = batches[0][0]
    with torch.no_grad():
        wanted = result.model(images)
        assert torch.equal(again(images), wanted)
        fast = accelerate(dense, plan_path(output), backend="torch")
        torch.testing.assert_close(fast(images), wanted, rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in slim.parameters())


@pytest.fixture
def spvit(tiny_vit):
    return apply_masks(tiny_vit, SPViT((0.7, 0.4), stages=(1, 3))), tiny_vit


def test_selectors_learn_alone_and_then_with_the_model(spvit, batches):
    slim, dense = spvit
    states = [weights(slim)]
    finetune(
        slim, dense, batches, epochs=3, frozen_epochs=2, weight_decay=0.0, backbone_rate=0.01,
        on_epoch=lambda _: states.append(weights(slim)), **QUICK,
    )  # fmt: skip
    moved = [{k: (b[k] - a[k]).abs().max().item() for k in a} for a, b in zip(states, states[1:])]
    for epoch, moves in enumerate(moved):
        plan = [move for k, move in moves.items() if k.startswith("plan.")]
        model = [move for k, move in moves.items() if not k.startswith("plan.")]
        assert min(plan) > 0
        assert (max(model) > 0) == (epoch == 2)
    # Adam's first step is the rate: 1 % of it.
    assert max(v for k, v in moved[2].items() if not k.startswith("plan.")) < 5e-5


def test_kept_shares_approach_the_plan(tiny_vit, batches):
    slim = apply_masks(tiny_vit, SPViT((0.9, 0.2), stages=(1, 3)))
    with torch.no_grad():
        for selector in slim.plan.selectors.values():
            selector.judge3.bias.zero_()  # as if half of the patches were wanted
    options = {**QUICK, "lr": 2e-2, "epochs": 30, "keep_weight": 20.0, "frozen_epochs": 30}
    log = finetune(slim, tiny_vit, batches, **options).report["epochs"]
    wanted = [14 / 16, 3 / 16]
    first, last = (
        max(abs(a - b) for a, b in zip(log[i]["shares"], wanted, strict=True)) for i in (0, -1)
    )
    assert last < 0.1 < first


def test_spvit_goes_on_after_ctrl_c_as_if_nothing_had_happened(spvit, batches, tmp_path):
    slim, dense = spvit
    options = {"epochs": 4, "frozen_epochs": 1, "ema_decay": 0.9, **QUICK}
    whole = finetune(deepcopy(slim), dense, batches, **options)
    output = tmp_path / "slim.safetensors"

    def stop(entry):
        if entry["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(deepcopy(slim), dense, batches, output=output, on_epoch=stop, **options)
    result = finetune(deepcopy(slim), dense, batches, output=output, **options)
    assert result.report["resumed"] == 2
    assert same(weights(result.model), weights(whole.model))


def test_another_plan_does_not_go_on(tiny_vit, batches, tmp_path):
    def stop(entry):
        if entry["epoch"] == 2:
            raise KeyboardInterrupt

    options = {"epochs": 2, "output": tmp_path / "slim.safetensors", **QUICK}
    with pytest.raises(KeyboardInterrupt):
        finetune(
            apply_masks(tiny_vit, Absorb(counts=COUNTS)),
            tiny_vit,
            batches,
            on_epoch=stop,
            **options,
        )
    other = apply_masks(tiny_vit, Absorb(counts=[17, 12, 9, 9, 6, 1]))
    with pytest.raises(CheckpointError, match="other settings"):
        finetune(other, tiny_vit, batches, **options)


def test_a_plan_without_a_kind_is_tuned_but_not_saved(tiny_vit, batches, tmp_path):
    class Nameless(Planner):
        choose = Largest.choose

    slim = apply_masks(tiny_vit, Nameless(COUNTS))
    assert finetune(slim, tiny_vit, batches, epochs=1, **QUICK).report["plan"]["kind"] == ""
    with pytest.raises(PlanError, match="Nameless has no kind"):
        finetune(slim, tiny_vit, batches, output=tmp_path / "slim.safetensors", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_selectors_learn_where_there_are_no_classes(tiny_vit, batches):
    tiny_vit.reset_classifier(0)
    slim = apply_masks(tiny_vit, SPViT((0.7, 0.4), stages=(1, 3)))
    (entry,) = finetune(slim, tiny_vit, batches, epochs=1, **QUICK).report["epochs"]
    assert math.isfinite(entry["loss"]) and len(entry["shares"]) == 2


def test_spvits_losses_are_the_formulas():
    torch.manual_seed(0)
    shares, wanted = torch.rand(5, 3), torch.tensor([0.7, 0.5, 0.3])
    by_hand = sum((shares[b, s] - wanted[s]) ** 2 for b in range(5) for s in range(3)) / 5
    torch.testing.assert_close(keep_loss(shares, wanted), by_hand)
    student, teacher = torch.randn(2, 3, 7, 12)
    policy = torch.randint(2, (3, 7)).float()
    errors = [
        ((F.layer_norm(student[b, i], (12,)) - F.layer_norm(teacher[b, i], (12,))) ** 2).mean()
        for b in range(3)
        for i in range(7)
        if policy[b, i]
    ]
    loss = token_loss(student, teacher, policy)
    torch.testing.assert_close(loss, torch.stack(errors).mean())
    assert token_loss(student, teacher, torch.zeros(3, 7)) == 0
    a, b = torch.randn(2, 5, 7)
    targets = torch.tensor([1, -1, 3, 0, -1])
    kl = (b.softmax(-1) * (b.log_softmax(-1) - a.log_softmax(-1))).sum(-1).mean()
    hard = F.cross_entropy(a[[0, 2, 3]], targets[[0, 2, 3]])
    torch.testing.assert_close(class_loss(a, b, targets, 0.5), hard + 0.5 * kl)
    torch.testing.assert_close(class_loss(a, b, torch.full((5,), -1), 0.5), 0.5 * kl)


def test_spvits_settings_follow_the_batch():
    assert spvit_settings(512) == {"epochs": 30, "lr": 5e-4}
    assert spvit_settings(128)["lr"] == pytest.approx(1.25e-4)
    settings = Settings(**spvit_settings(64))
    assert (settings.frozen_epochs, settings.backbone_rate, settings.keep_weight) == (5, 0.01, 2.0)


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


@pytest.mark.parametrize("frozen_epochs", [0, 1])
def test_a_plan_that_no_gradient_reaches_is_refused(tiny_vit, batches, frozen_epochs):
    class Probe(Planner):
        kind = "test-probe"
        learns = True

        def __init__(self, counts):
            super().__init__(counts)
            self.probe = torch.nn.Linear(64, 1)

        def choose(self, layer, view, n):
            return view.top(self.probe(view.alive.x)[..., 0].t(), n)

    slim = apply_masks(tiny_vit, Probe([12, 10, 8, 6, 4, 1]))
    with pytest.raises(PlanError, match="no gradient reaches the weights of Probe"):
        finetune(slim, tiny_vit, batches, epochs=2, frozen_epochs=frozen_epochs, progress=False)


@torch.no_grad()
def test_training_wants_its_own_gradients(pair, batches):
    slim, dense = pair
    before = weights(slim)
    finetune(slim, dense, batches, epochs=1, progress=False)
    assert any(not torch.equal(before[name], value) for name, value in weights(slim).items())
