"""Masks.plot, Masks.plot_pyramid and `slimvit show`."""

import argparse
import re

import numpy
import pytest
import torch
from PIL import Image

from slimvit.cli import show
from slimvit.errors import DataError, PlanError, UsageError
from slimvit.masks import Masks
from slimvit.masks._plot import faded

COUNTS = (20, 13, 13, 7, 2)  # of 5 * 4 patches and two prefix tokens


@pytest.fixture
def masks():
    scores = torch.rand(22, generator=torch.Generator().manual_seed(0))
    return Masks.from_counts(COUNTS, (5, 4), prefix=2, scores=scores, model="some_vit")


def call(*arguments):
    parser = argparse.ArgumentParser()
    show.add_arguments(parser)
    return show.run(parser.parse_args([str(argument) for argument in arguments]))


def panels(figure):
    return [axis.images[0].get_array() for axis in figure.axes if axis.images]


@pytest.mark.parametrize("kind", ["pil", "uint8", "chw", "normalised", "grey", "none"])
def test_panels_fade_exactly_the_pruned_patches(masks, kind):
    black = numpy.zeros((61, 47, 3), numpy.uint8)
    image = {
        "pil": Image.fromarray(black),
        "uint8": black,
        "chw": torch.zeros(3, 50, 40),
        "normalised": torch.full((3, 50, 40), -1.8).index_fill(2, torch.tensor([0]), 2.1),
        "grey": numpy.zeros((50, 40, 1)),
        "none": None,
    }[kind]
    drawn = panels(masks.plot(image))
    assert len(drawn) == len(COUNTS)
    cell = drawn[0].shape[0] // 5
    for block, panel in enumerate(drawn):
        assert panel.shape == (5 * cell, 4 * cell, 3)
        middles = panel[cell // 2 :: cell, cell // 2 :: cell, 0]  # red of each patch's middle
        kept = masks.keep[block, 2:].view(5, 4).numpy()
        assert (middles[kept] < 60).all()
        assert (middles[~kept] > 200).all()


def test_fading_keeps_the_pixels_of_kept_patches(masks):
    canvas = numpy.random.default_rng(0).integers(0, 256, (15, 12, 3), numpy.uint8)
    for block in range(masks.depth):
        kept = masks.keep[block, 2:].view(5, 4).numpy().repeat(3, 0).repeat(3, 1)
        result = faded(masks, canvas, block)
        assert (result[kept] == canvas[kept]).all()
        assert (result[~kept] >= 200).all()


@pytest.mark.parametrize("depth", [1, 6, 7, 12, 24])
def test_every_block_has_its_panel_and_its_count(depth):
    masks = Masks.uniform(depth, 0.5, (3, 3))
    figure = masks.plot()
    titles = [axis.get_title() for axis in figure.axes if axis.images]
    assert titles == [f"block {i + 1}: {n}" for i, n in enumerate(masks.counts)]
    assert "class token only" in {text.get_text() for axis in figure.axes for text in axis.texts}


def test_pyramid_has_a_bar_for_each_count_and_a_map_of_lifetimes(masks):
    figure = masks.plot_pyramid()
    bars, lives = figure.axes[:2]
    assert [bar.get_width() for bar in bars.patches[-masks.depth :]] == list(COUNTS)
    assert [text.get_text() for text in bars.texts] == [str(count) for count in COUNTS]
    expected = masks.keep[:, 2:].sum(0).view(5, 4).numpy()
    assert (lives.images[0].get_array() == expected).all()


def test_figures_leave_pyplot_alone(masks):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    masks.plot()
    masks.plot_pyramid()
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize(
    "image", [numpy.zeros((4, 4)), numpy.zeros((0, 4, 3)), "cat.jpg", torch.zeros(2, 3, 8, 8)]
)
def test_what_is_no_image_is_refused(masks, image):
    with pytest.raises(DataError, match="image must be"):
        masks.plot(image)


def test_image_with_nan_is_refused(masks):
    with pytest.raises(DataError, match="finite"):
        masks.plot(torch.full((3, 8, 8), torch.nan))


def test_show_writes_pictures_and_prints_counts(masks, tmp_path, capsys):
    masks.replace(errors=torch.linspace(0, 0.02, 5)).save(tmp_path / "m.safetensors")
    Image.new("RGB", (64, 48), "navy").save(tmp_path / "i.jpg")
    layers, pyramid = tmp_path / "layers.png", tmp_path / "pyramid.svg"
    status = call(
        "--masks", tmp_path / "m.safetensors", "--image", tmp_path / "i.jpg",
        "--output", layers, "--pyramid", pyramid,
    )  # fmt: skip
    assert status == 0
    pixels = numpy.asarray(Image.open(layers).convert("RGB"))
    assert pixels.shape[0] > 200
    navy = (abs(pixels.astype(int) - (0, 0, 128)) < 4).all(2)
    assert navy.mean() > 0.05  # kept patches, in full colour
    assert pyramid.read_text().lstrip().startswith("<?xml")
    out = capsys.readouterr().out
    assert "some_vit: 5 x 4 patches and 2 prefix tokens" in out
    counts = [int(row.split()[1]) for row in out.splitlines() if re.match(r"\d+ +\d+ ", row)]
    assert counts == list(COUNTS)
    assert "0.0200" in out


def test_show_without_pictures_prints_the_table(masks, tmp_path, capsys):
    masks.save(tmp_path / "m.safetensors")
    assert call("--masks", tmp_path / "m.safetensors") == 0
    assert "error" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_bad_input_leaves_nothing_behind(masks, tmp_path):
    good, output = tmp_path / "m.safetensors", tmp_path / "o.png"
    masks.save(good)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    cases = [
        (DataError, "broken.jpg cannot be read", ("--image", tmp_path / "broken.jpg")),
        (DataError, "absent.jpg cannot be read", ("--image", tmp_path / "absent.jpg")),
        (UsageError, "--output must end in", ("--output", tmp_path / "o.txt")),
        (UsageError, "--pyramid .*: the folder", ("--pyramid", tmp_path / "absent" / "p.png")),
        (PlanError, "not found", ("--masks", tmp_path / "absent.safetensors")),
    ]
    for kind, words, arguments in cases:
        with pytest.raises(kind, match=words) as caught:
            call("--masks", good, "--output", output, *arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="--image needs --output"):
        call("--masks", good, "--image", tmp_path / "broken.jpg")
    assert {path.name for path in tmp_path.iterdir()} == {"m.safetensors", "broken.jpg"}
