"""The transform of images: timm's own, of a model or its configuration."""

import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from slimvit.data import image_transform
from slimvit.errors import UsageError


@pytest.mark.parametrize("given", [None, "deit", 224, torch.nn.Linear(2, 2)])
def test_transform_is_of_a_model(given):
    with pytest.raises(UsageError, match="model_or_cfg must be .*, got"):
        image_transform(given)


def test_transform_is_timms():
    model = timm.create_model("deit_tiny_patch16_224")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 260, 3), np.uint8))
    expected = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    assert torch.equal(image_transform(model)(image), expected(image))
    assert torch.equal(image_transform(model.pretrained_cfg)(image), expected(image))


@pytest.mark.parametrize("training", [False, True])
def test_transform_fits_the_model(training):
    model = timm.create_model("test_vit", img_size=(32, 48), in_chans=1)
    transform = pickle.loads(pickle.dumps(image_transform(model, training)))
    assert transform(Image.new("L", (60, 50))).shape == (1, 32, 48)
    rgb = pickle.loads(pickle.dumps(image_transform(model.pretrained_cfg, training, img_size=40)))
    assert rgb(Image.new("RGB", (60, 50))).shape == (3, 40, 40)
