"""Fine-tuning under dynamic plans, and the training of those that learn."""

import json
import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from tuning import QUICK, same, weights

from slimvit import DPS, Absorb, Masks, Planner, SPViT, accelerate, apply_masks, load_plan, models
from slimvit.dynamic import Static
from slimvit.errors import CheckpointError, PlanError
from slimvit.finetune import (
    Settings,
    class_loss,
    finetune,
    keep_loss,
    plan_path,
    spvit_settings,
    timm_weights,
    token_loss,
)
from slimvit.finetune._optimizer import make_optimizer
from slimvit.finetune._student import Student

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
def test_every_plan_is_tuned_and_its_files_load_again(
    tiny_vit, labelled, tmp_path, kind, ema_decay
):
    slim = apply_masks(tiny_vit, plan_of_kind(kind, models.spec(tiny_vit)))
    before, output = weights(slim), tmp_path / "slim.safetensors"
    options = {"epochs": 1, "frozen_epochs": 0, "backbone_rate": 1.0, "ema_decay": ema_decay}
    result = finetune(slim, tiny_vit, labelled, output=output, **options, **QUICK)
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
    images = labelled[0][0]
    with torch.no_grad():
        wanted = result.model(images)
        assert torch.equal(again(images), wanted)
        fast = accelerate(dense, plan_path(output), backend="torch")
        torch.testing.assert_close(fast(images), wanted, rtol=1e-4, atol=1e-5)
    for name, parameter in slim.named_parameters():
        assert parameter.requires_grad == (kind == "spvit" or not name.startswith("plan.")), name


@pytest.fixture
def spvit(tiny_vit):
    return apply_masks(tiny_vit, SPViT((0.7, 0.4), stages=(1, 3))), tiny_vit


def test_selectors_learn_alone_and_then_with_the_model(spvit, labelled):
    slim, dense = spvit
    states = [weights(slim)]
    finetune(
        slim, dense, labelled, epochs=3, frozen_epochs=2, weight_decay=0.0, backbone_rate=0.01,
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


def test_kept_shares_approach_the_plan(tiny_vit, labelled):
    slim = apply_masks(tiny_vit, SPViT((0.9, 0.2), stages=(1, 3)))
    with torch.no_grad():
        for selector in slim.plan.selectors.values():
            selector.judge3.bias.zero_()  # as if half of the patches were wanted
    options = {**QUICK, "lr": 2e-2, "epochs": 30, "keep_weight": 20.0, "frozen_epochs": 30}
    log = finetune(slim, tiny_vit, labelled, **options).report["epochs"]
    wanted = [14 / 16, 3 / 16]
    first, last = (
        max(abs(a - b) for a, b in zip(log[i]["shares"], wanted, strict=True)) for i in (0, -1)
    )
    assert last < 0.1 < first


def test_spvit_goes_on_after_ctrl_c_as_if_nothing_had_happened(spvit, labelled, tmp_path):
    slim, dense = spvit
    options = {"epochs": 4, "frozen_epochs": 1, "ema_decay": 0.9, **QUICK}
    whole = finetune(deepcopy(slim), dense, labelled, **options)
    output = tmp_path / "slim.safetensors"

    def stop(entry):
        if entry["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(deepcopy(slim), dense, labelled, output=output, on_epoch=stop, **options)
    result = finetune(deepcopy(slim), dense, labelled, output=output, **options)
    assert result.report["resumed"] == 2
    assert same(weights(result.model), weights(whole.model))


def test_another_plan_does_not_go_on(tiny_vit, labelled, tmp_path):
    def stop(entry):
        if entry["epoch"] == 2:
            raise KeyboardInterrupt

    options = {"epochs": 2, "output": tmp_path / "slim.safetensors", **QUICK}
    with pytest.raises(KeyboardInterrupt):
        finetune(
            apply_masks(tiny_vit, Absorb(counts=COUNTS)),
            tiny_vit,
            labelled,
            on_epoch=stop,
            **options,
        )
    other = apply_masks(tiny_vit, Absorb(counts=[17, 12, 9, 9, 6, 1]))
    with pytest.raises(CheckpointError, match="of a run with other plan: delete it"):
        finetune(other, tiny_vit, labelled, **options)


def test_a_plan_without_a_kind_is_tuned_but_not_saved(tiny_vit, labelled, tmp_path):
    class Nameless(Planner):
        choose = Largest.choose

    slim = apply_masks(tiny_vit, Nameless(COUNTS))
    assert finetune(slim, tiny_vit, labelled, epochs=1, **QUICK).report["plan"]["kind"] == ""
    with pytest.raises(PlanError, match="Nameless has no kind"):
        finetune(slim, tiny_vit, labelled, output=tmp_path / "slim.safetensors", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_selectors_learn_where_there_are_no_classes(tiny_vit, labelled):
    tiny_vit.reset_classifier(0)
    slim = apply_masks(tiny_vit, SPViT((0.7, 0.4), stages=(1, 3)))
    (entry,) = finetune(slim, tiny_vit, labelled, epochs=1, **QUICK).report["epochs"]
    assert math.isfinite(entry["loss"]) and len(entry["shares"]) == 2


def test_a_model_that_was_frozen_to_the_end_may_learn_again(spvit, labelled):
    finetune(*spvit, labelled, epochs=1, **QUICK | {"frozen_epochs": 1})
    assert all(parameter.requires_grad for parameter in spvit[0].parameters())


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


def test_the_rate_that_is_told_is_the_plans(tiny_vit):
    class Bare(Planner):
        """Without norms and biases, the first group of timm's is the model's alone."""

        learns = True
        choose = Largest.choose

        def __init__(self, counts):
            super().__init__(counts)
            self.probe = torch.nn.Linear(64, 1, bias=False)

    slim = apply_masks(tiny_vit, Bare(COUNTS))
    first = make_optimizer(slim, True, Settings()).param_groups[0]
    assert first["lr_scale"] == 1.0
    assert [id(p) for p in first["params"]] == [id(slim.plan.probe.weight)]


def test_the_loss_of_tokens_does_not_choose_them(spvit, labelled):
    answer = Student(spvit[0].train())(labelled[0][0])
    assert answer.shares.requires_grad and answer.tokens.requires_grad
    assert not answer.policy.requires_grad


def test_spvits_settings_follow_the_batch():
    assert spvit_settings(512) == {"epochs": 30, "lr": 5e-4}
    assert spvit_settings(128)["lr"] == pytest.approx(1.25e-4)
    settings = Settings(**spvit_settings(64))
    assert (settings.frozen_epochs, settings.backbone_rate, settings.keep_weight) == (5, 0.01, 2.0)


@pytest.mark.parametrize("frozen_epochs", [0, 1])
def test_a_plan_that_no_gradient_reaches_is_refused(tiny_vit, labelled, frozen_epochs):
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
        finetune(slim, tiny_vit, labelled, epochs=2, frozen_epochs=frozen_epochs, progress=False)
