"""Blocks and whole networks of the CUDA kernels, emulated, against float64."""

import copy
import functools

import pytest
import torch
from cuda_checks import devices, devices_and_here, place, use
from emulated import A100, V100
from fused_blocks import Case, inputs, make, make_parts
from kernel_checks import FLOOR, check, check_stats, distance
from references import (
    MODELS,
    build,
    random_images,
    random_masks,
    reference_features,
    transposed,
)
from test_fused_block import CASES, reference
from torch import Tensor, nn

from slimvit import Masks, models
from slimvit.data import ImageFolder, image_transform, loader
from slimvit.errors import SlimvitError
from slimvit.masks import SEMANTICS
from slimvit.runtime import AcceleratedViT, accelerate

pytestmark = pytest.mark.usefixtures("emulated_cuda", "poison_empty")
NETWORKS = ["deit", "deit_distilled", "deit3", "dinov2_reg4", "clip_quickgelu", "oblong"]


@devices_and_here
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_block_errs_no_more_than_torch(device, case):
    dtype = use(device)
    block, parts = make(case, dtype, backend="cuda"), make_parts(case, dtype)
    x, keep, key_bias = inputs(case, dtype)
    before = x.clone()
    got, stats = block(x, keep, key_bias=key_bias, idle=case.idle)
    assert got.dtype == dtype
    assert torch.equal(x, before)
    check(got, lambda *given: reference(case, parts, keep, *given), x, key_bias)
    check_stats(stats, got)


@devices
@pytest.mark.parametrize("n", [1, 2])
def test_the_last_block_is_a_block(device, n):
    """Without keys and values of the others: the same answer."""
    dtype, case = use(device), Case(17, n, index=True, key_bias="Bm", zero_rows=4)
    x, index, key_bias = inputs(case, dtype)
    whole, last = (make(case, dtype, backend="cuda", last=last) for last in (False, True))
    wanted, _ = whole(x, index, key_bias=key_bias)
    got, _ = last(x, index, key_bias=key_bias)
    assert not torch.equal(last.keys, whole.keys)
    limit = 2e-3 if dtype == torch.float16 else 1.6e-2
    assert distance(got, wanted.double()) < limit


@devices
@pytest.mark.parametrize("last", [False, True])
def test_any_strides(device, last):
    """What is not contiguous: the same bits."""
    dtype, case = use(device), Case(17, 2, 3, index=True, key_bias="Bm", last=last)
    block, (x, index, key_bias) = make(case, dtype, backend="cuda"), inputs(case, dtype)
    wanted, _ = block(x, index, key_bias=key_bias)
    for view in (x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
        assert not view.is_contiguous()
        assert torch.equal(block(view, index, key_bias=key_bias)[0], wanted)
    index, key_bias = index.t().contiguous().t(), key_bias.double().t().contiguous().t()
    assert torch.equal(block(x, index, key_bias=key_bias)[0], wanted)


@functools.cache
def model_of(name: str) -> nn.Module:
    """Not to be changed."""
    return build(name)


def accelerated(model: nn.Module, masks: Masks, dtype: torch.dtype) -> AcceleratedViT:
    precision = str(dtype).removeprefix("torch.")
    fast = accelerate(model, masks, backend="cuda", precision=precision)
    assert (fast.backend, fast.precision) == ("cuda", precision)
    return fast


@torch.no_grad()
def errs_no_more_than_torch(model: nn.Module, fast: AcceleratedViT, images: Tensor) -> None:
    """Features and logits, beside those of timm's blocks in the same dtype."""
    dtype = getattr(torch, fast.precision)

    def timms(dtype: torch.dtype) -> list[Tensor]:
        twin = copy.deepcopy(model).to(dtype)
        features = reference_features(twin, images.to(dtype), fast.masks)
        return [features, twin.forward_head(features)]

    features = fast.forward_features(images)
    got = features, fast.forward_head(features)
    for mine, own, exact in zip(got, timms(dtype), timms(torch.float64)):
        assert distance(mine, exact) <= max(2 * distance(own, exact), FLOOR[dtype])


@devices_and_here
@pytest.mark.parametrize(("name", "number"), [*zip(NETWORKS, range(len(NETWORKS)))])
def test_a_network_errs_no_more_than_torch(device, name, number):
    dtype, model = use(device), copy.deepcopy(model_of(name))
    masks, images = random_masks(model, SEMANTICS[number % 3]), random_images(model, 1 + number % 2)
    images = images.bfloat16().float().to(place(device))
    fast = accelerated(model.to(place(device)), masks, dtype)
    errs_no_more_than_torch(model, fast, images)
    assert torch.equal(fast(images), fast.forward_head(fast.forward_features(images)))


@devices
def test_weights_of_any_strides(device):
    dtype, model = use(device), model_of("deit")
    masks, images = random_masks(model), random_images(model, 2)
    wanted = accelerated(model, masks, dtype)(images)
    got = accelerated(transposed(model), masks, dtype)(images)
    assert distance(got, wanted.double()) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("device", [V100], ids=str)
def test_a_real_image(device, real):
    name = "deit_tiny_patch16_224"
    model = models.create(name, checkpoint=real / f"{name}.safetensors")
    folder = ImageFolder(real / "images", samples=1, transform=image_transform(model))
    images, _ = next(iter(loader(folder, 1)))
    masks = Masks.from_counts([97, 63, 40, *[25] * 8, 1], (14, 14))
    errs_no_more_than_torch(model, accelerated(model, masks, use(device)), images)


@pytest.mark.parametrize("name", ["dinov2_swiglu", "qk_norm"])
def test_other_models_are_refused(name):
    use(A100)
    assert name in MODELS
    model = model_of(name)
    with pytest.raises(SlimvitError, match="^back end cuda does not compute this model: block 1"):
        accelerated(model, random_masks(model), torch.bfloat16)
