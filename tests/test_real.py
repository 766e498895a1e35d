"""The commands one after the other on the real DeiT-Ti and real images, as a user types them."""

import json

import pytest
import torch

from slimvit import Masks, cli, macs, models

NAME = "deit_tiny_patch16_224"


@pytest.fixture(scope="module")
def work(real, tmp_path_factory):
    """A folder with masks that `slimvit prune` found on 32 images of the first 250 classes."""
    folder = tmp_path_factory.mktemp("real")
    arguments = [
        *("prune", "--samples", "32", "--subset", "0:250", "--tolerance", "0.02", "-b", "16"),
        *("--output", str(folder / "masks.safetensors"), "--json", str(folder / "prune.json")),
    ]
    assert cli.main([*arguments, *model_and_images(real)]) == 0
    return folder


def model_and_images(real) -> list[str]:
    return [
        *("--model", NAME, "--checkpoint", str(real / f"{NAME}.safetensors")),
        *("--data-dir", str(real / "images"), "--class-map", str(real / "imagenet_synsets.txt")),
    ]


def test_prune_cuts_nearly_half(work):
    report = json.loads((work / "prune.json").read_text())
    assert {"kept", "cut", "errors", "seconds"} <= set(report)
    assert report["cut"] >= 0.44
    assert max(report["errors"]) <= 0.02
    masks = Masks.load(work / "masks.safetensors")
    assert list(masks.counts) == report["kept"]
    assert masks.counts[-1] == 1
    assert macs.cut(models.spec(models.create(NAME)), masks) == report["cut"]


def test_most_answers_stay(work, real):
    output = work / "validate.json"
    arguments = ["validate", "--masks", str(work / "masks.safetensors"), "--json", str(output)]
    arguments += ["--subset", "440:500", "-b", "20", *model_and_images(real)]
    assert cli.main(arguments) == 0
    report = json.loads(output.read_text())
    assert report["images"] == 60
    assert report["dense_top1"] >= 60
    assert report["agreement"] >= 60  # 4 standard deviations below what 250 images gave
    assert report["top5"] >= report["top1"] >= report["dense_top1"] - 20
    assert report["gmacs"] == pytest.approx(report["dense_gmacs"] * (1 - report["cut"]))


def test_masks_are_shown_over_an_image(work, real):
    picture = work / "kept.png"
    image = next((real / "images").glob("*/*.jpg"))
    arguments = ["show", "--masks", str(work / "masks.safetensors")]
    assert cli.main([*arguments, "--image", str(image), "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_accelerated_answers_are_those_of_the_masks(work, real, precision):
    from slimvit import accelerate, apply_masks
    from slimvit.data import ImageFolder, image_transform, loader

    model = models.create(NAME, checkpoint=real / f"{NAME}.safetensors")
    folder = ImageFolder(real / "images", samples=6, transform=image_transform(model))
    images, _ = next(iter(loader(folder, 6)))
    slim = apply_masks(model, work / "masks.safetensors")
    fast = accelerate(model, work / "masks.safetensors", precision=precision)
    with torch.no_grad():
        wanted, got = slim(images), fast(images)
        own = slim.to(torch.bfloat16)(images.bfloat16()).float() - wanted
    bound = 1e-5 if precision == "float32" else 2 * float(own.norm() / wanted.norm())
    assert float((got - wanted).norm() / wanted.norm()) <= bound
