"""Counts of Absorb chosen by the model's answers or by a measured speed."""

import json
from pathlib import Path

import pytest
import torch
from references import build

from slimvit.dynamic import Absorb, Shape, load_plan
from slimvit.errors import DataError, PlanError, SlimvitError, UsageError
from slimvit.macs import cut
from slimvit.models import spec
from slimvit.runtime import apply_masks
from slimvit.search import absorb, fit_absorb, fit_thresholds

SHAPES = (Shape(0), Shape(1), Shape(2, 1.6), Shape(1, 1.0, 0.6))


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 64, 64, generator=generator) for size in (3, 2)]


def kl(model, plan, batches):
    """Of each image, [5]."""
    images = torch.cat(batches)
    with torch.no_grad():
        p = model(images).double().softmax(1)
        q = apply_masks(model, plan).eval()(images).double().softmax(1)
    return (p * (p / q).log()).sum(1)


def test_takes_the_shape_whose_answers_stay_nearest(tiny_vit, batches):
    shapes = SHAPES[:1] + SHAPES[2:]  # without Absorb's own
    plan, trials = fit_absorb(tiny_vit, batches, cut=0.25, shapes=shapes, progress=False)
    shape = spec(tiny_vit)
    assert cut(shape, plan) == pytest.approx(0.25, abs=0.04)
    tried = absorb._plans(shape, 0.25, shapes)
    assert len(tried) > 1
    by_hand = [float(kl(tiny_vit, each, batches).mean()) for each in tried]
    assert plan.counts == tried[by_hand.index(min(by_hand))].counts
    assert [trial.counts for trial in trials] == [each.counts for each in tried]
    assert [trial.divergence for trial in trials] == pytest.approx(by_hand, rel=1e-4, abs=1e-9)
    assert {trial.error for trial in trials} == {None}


@pytest.mark.parametrize("sure", [0.0, 1.0, 2.0, 1e9])
def test_its_own_shape_gives_way_to_one_that_is_surely_better(tiny_vit, batches, monkeypatch, sure):
    monkeypatch.setattr(absorb, "_SURE", sure)
    plan, trials = fit_absorb(tiny_vit, batches, cut=0.25, shapes=SHAPES, progress=False)
    own = Absorb(cut=0.25).bind(spec(tiny_vit)).counts
    found = {t.counts: kl(tiny_vit, Absorb(counts=t.counts), batches) for t in trials}
    for trial in trials:
        apart = found[trial.counts] - found[own]
        error = float(apart.std() / len(apart) ** 0.5)
        assert trial.error == pytest.approx(error, rel=1e-3, abs=1e-8)
    best = min(found, key=lambda counts: float(found[counts].mean()))
    assert best != own  # else nothing would be asked of it
    apart = found[own] - found[best]
    gives_way = apart.mean() > sure * apart.std() / len(apart) ** 0.5
    assert plan.counts == (best if gives_way else own)
    assert sure != 1e9 or plan.counts == own
    assert sure != 0.0 or plan.counts == best


@pytest.mark.parametrize("options", [{"cut": 0.3}, {"speedup": 1.01}])
def test_the_model_stays_in_its_mode(tiny_vit, batches, monkeypatch, options):
    """And is asked in evaluation mode."""
    monkeypatch.setattr(absorb, "measure_speedup", lambda *_: 2.0)
    tiny_vit.head_drop.p = 0.5
    options |= {"shapes": SHAPES, "progress": False}
    wanted = fit_absorb(tiny_vit, batches, **options)[1]
    tiny_vit.train().blocks[2].eval()
    modes = [module.training for module in tiny_vit.modules()]
    assert fit_absorb(tiny_vit, batches, **options)[1] == wanted
    assert modes == [module.training for module in tiny_vit.modules()]


def test_images_of_integers_have_not_been_normalised(tiny_vit, batches):
    integers = [batch.byte() for batch in batches]
    with pytest.raises(SlimvitError, match="images must be floating point, got uint8"):
        fit_absorb(tiny_vit, integers, cut=0.3, progress=False)
    with pytest.raises(SlimvitError, match="images must be floating point, got uint8"):
        fit_thresholds(tiny_vit, Absorb(cut=0.3), integers, progress=False)


def test_is_the_same_however_images_are_batched(tiny_vit, batches):
    whole = [(torch.cat(batches), torch.zeros(5))]
    one, other = (
        fit_absorb(tiny_vit, images, cut=0.3, shapes=SHAPES, progress=False)[0]
        for images in (batches, whole)
    )
    assert one.counts == other.counts


@pytest.mark.parametrize("options", [{"cut": 0.25}, {"speedup": 1.25}])
def test_a_loader_that_is_read_once_loses_no_batch(tiny_vit, batches, monkeypatch, options):
    shape, seen = spec(tiny_vit), []

    def measured(_, plan, images):
        seen.append(images)
        return 1 / (1 - cut(shape, plan))

    monkeypatch.setattr(absorb, "measure_speedup", measured)
    options = {"shapes": SHAPES, "progress": False, **options}
    once = fit_absorb(tiny_vit, iter(batches), **options)[1]
    assert once == fit_absorb(tiny_vit, batches, **options)[1]
    assert all(images is batches[0] for images in seen)


def test_one_image_is_not_sure_of_anything(tiny_vit, batches):
    """Another shape is better by it, and no other image tells by how much that is luck."""
    own = Absorb(cut=0.25).bind(spec(tiny_vit)).counts
    for image in torch.cat(batches).split(1):
        plan, trials = fit_absorb(tiny_vit, [image], cut=0.25, shapes=SHAPES, progress=False)
        assert plan.counts == own
        assert {trial.error for trial in trials} == {float("inf")}


def test_without_images_it_is_absorbs_own_schedule(tiny_vit):
    plan, trials = fit_absorb(tiny_vit, cut=0.3)
    assert trials == ()
    assert plan.counts == Absorb(cut=0.3).bind(spec(tiny_vit)).counts


def test_a_speedup_takes_the_least_cut_that_reaches_it(tiny_vit, monkeypatch):
    shape = spec(tiny_vit)

    def measured(model, plan, images):
        assert images.shape == (1, 3, 64, 64)
        return 1 / (1 - cut(shape, plan))

    monkeypatch.setattr(absorb, "measure_speedup", measured)
    plan, _ = fit_absorb(tiny_vit, speedup=1.25)
    assert 0.2 <= cut(shape, plan) <= 0.26
    with pytest.raises(SlimvitError, match="speed-up 50 is out of reach"):
        fit_absorb(tiny_vit, speedup=50)


@pytest.mark.parametrize("own", [True, False])
def test_the_plan_that_is_taken_reaches_the_speedup(tiny_vit, batches, monkeypatch, own):
    """By a stopwatch that goes by the cut, but for plans that are slow."""
    shape, slow = spec(tiny_vit), set()
    monkeypatch.setattr(absorb, "_SURE", 0.0)
    monkeypatch.setattr(
        absorb,
        "measure_speedup",
        lambda _, plan, images: 1.0 if plan.counts in slow else 1 / (1 - cut(shape, plan)),
    )
    standard = fit_absorb(tiny_vit, speedup=1.25)[0].counts

    def fit():
        shapes = SHAPES if own else SHAPES[:1] + SHAPES[2:]
        plan, trials = fit_absorb(tiny_vit, batches, speedup=1.25, shapes=shapes, progress=False)
        return plan.counts, sorted(trials, key=lambda trial: trial.divergence)

    taken, trials = fit()
    assert taken == trials[0].counts != standard  # else nothing would be asked
    slow.add(taken)
    assert fit()[0] == trials[1].counts
    slow.update(trial.counts for trial in trials if trial.counts != standard)
    assert fit()[0] == standard


def test_a_speedup_is_really_measured(tiny_vit):
    from slimvit.search.budget import measure_speedup

    images = torch.zeros(1, 3, 64, 64)
    assert measure_speedup(tiny_vit, Absorb(cut=0.3), images, rounds=1) > 0


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({}, UsageError, "one of cut and speedup"),
        ({"cut": 0.3, "speedup": 2.0}, UsageError, "one of cut and speedup"),
        ({"cut": 0.0}, UsageError, r"cut must be finite, above 0 and below 1, got 0.0"),
        ({"cut": float("nan")}, UsageError, "cut must be finite, above 0 and below 1, got nan"),
        ({"speedup": 1.0}, UsageError, "speedup must be finite and above 1"),
        ({"speedup": float("nan")}, UsageError, "speedup must be finite and above 1"),
        ({"cut": 0.3, "loader": []}, DataError, "no images"),
        ({"speedup": 1.5, "loader": []}, DataError, "no images"),
        ({"cut": 0.3, "shapes": [], "loader": [1]}, UsageError, "shapes must not be empty"),
        ({"cut": 0.99}, PlanError, "cut must be at most"),
    ],
)
def test_bad_input(tiny_vit, options, error, message):
    loader = options.pop("loader", None)
    with pytest.raises(error, match=message):
        fit_absorb(tiny_vit, loader, **options)


def test_the_limit_is_that_of_the_shape_that_reaches_furthest(tiny_vit):
    shapes, shape = (Shape(1, 1.6, 0.5), Shape(2, 1.6, 0.9)), spec(tiny_vit)
    with pytest.raises(PlanError, match=r"cut must be at most \S+ for test_vit, got 0.97") as error:
        fit_absorb(tiny_vit, [1], cut=0.97, shapes=shapes, progress=False)
    most = float(str(error.value).split()[5])
    assert [plan.counts for plan in absorb._plans(shape, most, shapes)]
    with pytest.raises(PlanError):
        absorb._plans(shape, most + 1e-3, shapes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tiny_vit, batches, dtype):
    options = {"cut": 0.3, "shapes": SHAPES, "progress": False}
    whole = fit_absorb(tiny_vit, batches, **options)[1]
    half = fit_absorb(tiny_vit.to(dtype), batches, **options)[1]
    for one, other in zip(whole, half, strict=True):
        assert one.counts == other.counts
        assert one.divergence == pytest.approx(other.divergence, rel=0.5)


@torch.no_grad()
def test_without_classes_it_is_the_error_of_the_features(tiny_vit, batches):
    tiny_vit.reset_classifier(0)
    trials = fit_absorb(tiny_vit, batches, cut=0.3, shapes=SHAPES, progress=False)[1]
    images = torch.cat(batches)
    for trial in trials:
        wanted = tiny_vit(images)
        got = apply_masks(tiny_vit, Absorb(counts=trial.counts)).eval()(images)
        error = ((got - wanted) ** 2).sum(1) / (wanted**2).sum(1)
        assert trial.divergence == pytest.approx(float(error.mean()), rel=1e-4)


def test_answers_that_are_not_finite_choose_nothing(tiny_vit, batches):
    batches[1][0, 0, 0, 0] = torch.nan
    with pytest.raises(SlimvitError, match="not finite"):
        fit_absorb(tiny_vit, batches, cut=0.3, shapes=SHAPES, progress=False)


def test_prune_absorb_writes_the_best_plan(prune, tiny_vit):
    status, out, error = prune("--absorb", "--cut", "0.3", "--json", "a.json")
    assert status == 0, error
    assert "fewer MACs, choosing included" in out and "wrote plan.safetensors" in out
    plan, report = load_plan("plan.safetensors"), json.loads(Path("a.json").read_text())
    assert plan.kind == report["plan"] == "absorb"
    assert report["cut"] == pytest.approx(cut(spec(tiny_vit), plan), abs=1e-6)
    best = min(report["trials"], key=lambda trial: trial["divergence"])
    own = list(Absorb(cut=0.3).bind(spec(tiny_vit)).counts)
    assert list(plan.counts) == report["kept"]
    assert report["kept"] in (best["counts"], own)
    assert out.count("taken") == 1
    assert report["images"] == 6


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--absorb"], "--absorb needs --cut or --speedup"),
        (["--absorb", "--tolerance", "0.1"], "--absorb needs --cut or --speedup"),
        (["--absorb", "--cut", "0.3", "--dynamic"], "--dynamic has no meaning with --absorb"),
        (["--absorb", "--cut", "0.3", "--epochs", "1"], "--epochs has no meaning with --absorb"),
        (["--absorb", "--cut", "0.3", "--semantics", "zero"], "--semantics has no meaning"),
        (["--absorb", "--cut", "0.97"], "cut must be at most"),
    ],
)
def test_prune_absorb_refuses(prune, flags, words):
    status, _, error = prune(*flags)
    assert status in (1, 2) and words in error
    assert error.count("\n") == 1
    assert not Path("plan.safetensors").exists()


def test_images_of_another_size():
    with pytest.raises(
        SlimvitError, match=r"images must be \[B, 3, 64, 64\], got \[2, 3, 32, 32\]"
    ):
        fit_absorb(build("deit"), [torch.zeros(2, 3, 32, 32)], cut=0.1)
