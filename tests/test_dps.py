"""DPS: the predictors by hand, where they stand, and their file."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimvit import DPS, accelerate, apply_masks, load_plan
from slimvit.dynamic.dps import Predictor
from slimvit.macs import gmacs
from slimvit.masks import Masks
from slimvit.models import spec

COUNTS = (17, 13, 13, 9, 6, 1)


CHOOSING = (1, 3, 4)


def smooth_images(count: int, seed: int = 0) -> Tensor:
    """Images whose patches differ, [count, 3, 64, 64]."""
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.randn(count, 3, 16, 16, generator=generator), 64)


def masks_of(model: nn.Module, counts=COUNTS, **fields) -> Masks:
    shape = spec(model)
    info = {"model": shape.name, "image_size": shape.image_size} | fields
    return Masks.from_counts(counts, shape.grid, shape.prefix, **info)


@pytest.mark.parametrize("m, batch, width, hidden", [(1, 1, 5, 3), (7, 3, 9, 4), (63, 2, 33, 16)])
def test_predictor_by_hand(m, batch, width, hidden):
    torch.manual_seed(0)
    predictor = Predictor(width, hidden).double()
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(m, batch, width, dtype=torch.double)
    got = predictor(x)
    assert got.shape == (batch, m)
    for b in range(batch):
        for i in range(m):
            t = x[i, b]
            y = (t - t.mean()) / (t.var(correction=0) + 1e-6).sqrt()
            y = y * predictor.norm.weight + predictor.norm.bias
            h = predictor.down.weight @ y + predictor.down.bias
            h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
            expected = predictor.score.weight[0] @ h + predictor.score.bias[0]
            torch.testing.assert_close(got[b, i], expected, rtol=1e-10, atol=1e-12)


def test_predictors_stand_where_patches_are_pruned(tiny_vit, monkeypatch):
    plan = DPS(COUNTS).bind(spec(tiny_vit))
    assert plan.pruning == CHOOSING
    assert tuple(map(int, plan.predictors)) == CHOOSING
    assert plan.channels == 16  # 64 / 4
    alive = 17 + 13 + 9
    assert plan.macs(spec(tiny_vit)) == alive * (64 * 16 + 16)
    dense, slim = gmacs(spec(tiny_vit)), gmacs(spec(tiny_vit), plan)
    assert slim - gmacs(spec(tiny_vit), masks_of(tiny_vit)) == pytest.approx(
        plan.macs(spec(tiny_vit)) / 1e9
    )
    assert slim < dense
    state = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", None)  # GPUs' generators are the caller's
    again = DPS(COUNTS).bind(spec(tiny_vit))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in plan.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("width, hidden", [(192, 48), (384, 96), (768, 192), (200, 48), (20, 16)])
def test_channels_are_a_quarter_in_multiples_of_16(tiny_vit, width, hidden):
    shape = dataclasses.replace(spec(tiny_vit), width=width)
    assert DPS(COUNTS).bind(shape).channels == hidden
    assert DPS(COUNTS, hidden=7).bind(shape).predictors["1"].down.out_features == 7


@torch.no_grad()
def test_each_image_keeps_its_highest_scores(tiny_vit):
    slim = apply_masks(tiny_vit, DPS(COUNTS))
    seen: dict[int, Tensor] = {}
    for name, predictor in slim.plan.predictors.items():
        predictor.register_forward_hook(lambda m, i, o, name=name: seen.update({int(name): o}))
    kept = slim.kept_sets(smooth_images(3))
    alive = torch.arange(17).expand(3, -1)
    for layer, (places, n) in enumerate(zip(kept, COUNTS, strict=True)):
        for b in range(3):
            assert set(places[b].tolist()) <= set(alive[b].tolist())
            assert places[b, 0] == 0
        if layer in CHOOSING:
            best = seen[layer][:, 1:].topk(n - 1).indices + 1
            expected = alive.gather(1, best).sort(1).values
            assert torch.equal(places[:, 1:], expected)
        alive = places
    assert any(not torch.equal(k[0], k[1]) for k in kept)


def test_save_and_load(tiny_vit, tmp_path):
    images, file = smooth_images(3), tmp_path / "plan.safetensors"
    plan = DPS(COUNTS, hidden=5).bind(spec(tiny_vit))
    plan.save(file)
    loaded = load_plan(file)
    assert type(loaded) is DPS and loaded.settings() == plan.settings()
    with torch.no_grad():
        wanted = apply_masks(tiny_vit, plan)(images)
        assert torch.equal(apply_masks(tiny_vit, file)(images), wanted)
        fast = accelerate(tiny_vit, file, backend="torch")(images)
    torch.testing.assert_close(fast, wanted, rtol=1e-5, atol=1e-5)
