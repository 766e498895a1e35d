"""DeiT-Ti from image to logits: timm's, and accelerated with all tokens and with 45 % fewer MACs.

Each is timed only after its logits have matched the float32 reference. For comparisons that
count, across runtimes and in alternating rounds, there is `slimvit bench`.
"""

import pytest
import timm
import torch

from slimvit import Masks, accelerate, apply_masks
from slimvit.backends import NAMES, why_not
from slimvit.bench import TOLERANCES, parse_keep
from slimvit.export import relative_error, sample_images
from slimvit.models import spec
from slimvit.runtime import PRECISIONS

COUNTS = parse_keep("141,141,131,121,111x7,1")
KEPT = {"dense": (197,) * 12, "slim": COUNTS}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224").eval()


@pytest.fixture(params=[1, 8], ids=["b1", "b8"])
def images(request):
    return sample_images((3, 224, 224), request.param)


@pytest.fixture(params=["float32", "bfloat16"])
def precision(request):
    return request.param


@torch.inference_mode()
def test_timm(benchmark, model, images, precision):
    wanted = model(images)
    dtype = PRECISIONS[precision]
    timed = timm.create_model("deit_tiny_patch16_224").eval()
    timed.load_state_dict(model.state_dict())
    timed.to(dtype)
    assert relative_error(timed(images.to(dtype)).float(), wanted) <= TOLERANCES[precision]
    benchmark(lambda: timed(images.to(dtype)).float())


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("backend", NAMES)
@torch.inference_mode()
def test_accelerated(benchmark, model, images, precision, backend, kept):
    reason = why_not(backend, "cpu", PRECISIONS[precision])
    if reason:
        pytest.skip(reason)
    masks = Masks.from_counts(KEPT[kept], spec(model).grid)
    wanted = apply_masks(model, masks)(images)
    fast = accelerate(model, masks, backend=backend, precision=precision)
    assert relative_error(fast(images), wanted) <= TOLERANCES[precision]
    benchmark(fast, images)
