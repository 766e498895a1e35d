"""Pictures of plans: which token each patch is part of, and what is drawn of it."""

import numpy
import pytest
import torch
from references import build, random_images
from test_show import panels

from slimvit import Absorb, apply_masks
from slimvit.dynamic import DPS, SPViT
from slimvit.dynamic.plot import averaged, groups, plot_counts, plot_kept
from slimvit.errors import DataError
from slimvit.models import spec

COUNTS = [12, 6, 4]
PLANS = {
    "absorb": Absorb(counts=COUNTS),
    "dps": DPS(COUNTS),
    "spvit": SPViT([0.6, 0.3], stages=[0, 1]),
}


def slimmed(kind: str, name: str = "deit"):
    model = build(name)
    return apply_masks(model, PLANS[kind]), random_images(model, 1)


@pytest.mark.parametrize("kind", PLANS)
def test_kept_tokens_own_themselves(kind):
    slim, image = slimmed(kind)
    for owner, kept in zip(groups(slim, image), slim.kept_sets(image), strict=True):
        places = kept[0][kept[0] < 17]
        assert owner.shape == (17,)
        assert torch.equal(owner[places], places)
        assert set(owner.tolist()) - {-1} == set(places.tolist())


def test_every_token_is_part_of_some():
    slim, image = slimmed("absorb")
    before = torch.arange(17)
    for owner in groups(slim, image):
        assert (owner >= 0).all()
        assert owner[0] == 0
        assert (owner[1:] != 0).all()  # nothing goes into the class token
        for one in before.unique():
            assert len(owner[before == one].unique()) == 1  # groups stay together
        before = owner


@pytest.mark.parametrize("kind", ["dps", "spvit"])
def test_what_is_dropped_is_part_of_none(kind):
    slim, image = slimmed(kind)
    for owner, kept in zip(groups(slim, image), slim.kept_sets(image), strict=True):
        gone = torch.ones(17, dtype=torch.bool)
        gone[kept[0][kept[0] < 17]] = False
        assert (owner[gone] == -1).all()


def test_the_plan_is_left_as_it_was():
    slim, image = slimmed("absorb")
    with torch.no_grad():
        before = slim(image)
        groups(slim, image)
        assert torch.equal(slim(image), before)
    assert "choose" not in vars(slim.plan)


def test_averaged_fills_groups_with_their_mean():
    canvas = numpy.random.default_rng(0).integers(0, 256, (6, 9, 3), numpy.uint8)
    owner = numpy.array([[0, 0, 2], [-1, 0, -1]])
    drawn = averaged(canvas, owner)
    group = numpy.concatenate([canvas[:3, :6].reshape(-1, 3), canvas[3:, 3:6].reshape(-1, 3)]).mean(
        0
    )
    assert numpy.abs(drawn[:3, :6] - group).max() <= 0.5
    assert numpy.abs(drawn[3:, 3:6] - group).max() <= 0.5
    alone, gone = (slice(3), slice(6, 9)), ((slice(3, 6), slice(3)), (slice(3, 6), slice(6, 9)))
    for rows, columns in (alone, *gone):
        assert (drawn[rows, columns] == canvas[rows, columns]).all()


@pytest.mark.parametrize("name", ["deit", "oblong"])
def test_a_panel_for_each_block(name):
    model = build(name)
    shape = spec(model)
    plan = DPS([shape.prefix + k for k in (9, 4)] + [shape.head_tokens])
    slim, image = apply_masks(model, plan), random_images(model, 1)
    figure = plot_kept(slim, image, torch.zeros(3, 60, 60))
    drawn = panels(figure)
    assert len(drawn) == 3
    for panel, kept in zip(drawn, slim.kept_sets(image), strict=True):
        cell = panel.shape[0] // shape.grid[0]
        black = panel[cell // 2 :: cell, cell // 2 :: cell, 0] < 60
        patches = kept[0][kept[0] >= shape.prefix] - shape.prefix
        assert numpy.flatnonzero(black).tolist() == patches.tolist()
    assert "dps" in figure.get_suptitle()
    assert any("class token only" in text.get_text() for a in figure.axes for text in a.texts)
    with pytest.raises(DataError, match="image must be"):
        plot_kept(slim, image, "cat.jpg")


def test_a_bar_for_each_count():
    plan = PLANS["spvit"].bind(spec(build("deit")))
    (bars,) = plot_counts(plan).axes
    assert [bar.get_width() for bar in bars.patches[-3:]] == list(plan.counts)
