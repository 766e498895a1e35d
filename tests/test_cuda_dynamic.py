"""Blocks and models that choose tokens for each image by the CUDA kernels, emulated."""

import copy
import functools
import math

import pytest
import timm
import torch
from cuda_checks import devices, devices_and_here, place, use
from emulated import A100
from fused_blocks import Case
from kernel_checks import FLOOR, check_stats, distance
from references import random_images
from test_fused_dynamic import BLOCKS, alive_of, arguments, reference, steady
from test_fused_dynamic_vit import model_of, plans
from torch import Tensor, nn

from slimvit.dynamic import Absorb, SPViT
from slimvit.errors import SlimvitError
from slimvit.runtime import accelerate, apply_masks

pytestmark = pytest.mark.usefixtures("emulated_cuda", "poison_empty")


@devices_and_here
@pytest.mark.parametrize(("case", "prefix", "tokens", "sized"), BLOCKS, ids=str)
def test_a_block_errs_no_more_than_torch(device, case, prefix, tokens, sized):
    dtype = use(device)
    alive = steady(case, prefix, tokens, sized, dtype)
    given = arguments(case, alive, prefix, tokens)
    out, stats, size, bias, spread, index = torch.ops.slimvit.absorb_block(**given, backend="cuda")
    wanted, own = (reference(case, alive, prefix, tokens, k) for k in (torch.float64, dtype))
    assert torch.equal(index, wanted.place)
    exact = wanted.x.transpose(0, 1)
    torchs = distance(own.x.transpose(0, 1), exact)
    assert out.dtype == dtype
    assert distance(out, exact) <= max(2 * torchs, FLOOR[dtype])
    check_stats(stats, out, spread)
    torch.testing.assert_close(size, wanted.size.float())
    torch.testing.assert_close(bias, size.log(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sized", [False, True])
def test_opcheck(sized):
    case = Case(17, 9, 2)
    given = arguments(case, alive_of(case, sized, 0, use(A100)), 1, 1) | {"backend": "cuda"}
    torch.library.opcheck(torch.ops.slimvit.absorb_block, (), given)


PAIRS = [
    ("deit", "falling"),
    ("deit", "late"),
    ("deit", "dps"),
    ("deit_distilled", "falling"),
    ("deit_distilled", "spvit"),
    ("deit_distilled", "dps_alternating"),
    ("dinov2_reg4", "late"),
    ("dinov2_reg4", "spvit"),
    ("clip_quickgelu", "alternating"),
]


@functools.cache
def fast_of(name: str, plan: str, dtype: torch.dtype, where: str = "cpu") -> nn.Module:
    precision, model = str(dtype).removeprefix("torch."), copy.deepcopy(model_of(name)).to(where)
    return accelerate(model, plans(name)[plan], backend="cuda", precision=precision)


def slim_of(name: str, plan: str, dtype: torch.dtype) -> nn.Module:
    """In plain PyTorch, with the weights that `dtype` holds."""
    return apply_masks(copy.deepcopy(model_of(name)).to(dtype), plans(name)[plan]).eval()


@torch.no_grad()
def steady_images(name: str, plan: str, dtype: torch.dtype, count: int) -> Tensor:
    """Images of which the same tokens are kept whether in `dtype` or in float64, shaken or not."""
    images = random_images(model_of(name), 48).to(dtype)
    exact, own = slim_of(name, plan, torch.float64), slim_of(name, plan, dtype)
    kept = torch.cat(exact.kept_sets(images.double()), 1)
    same = (torch.cat(own.kept_sets(images), 1) == kept).all(1)
    shake = max(16 * torch.finfo(dtype).eps, 1 / 16)
    for seed in range(4):
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)).sign()
        shaken = images.double() * (1 + shake * noise)
        same &= (torch.cat(exact.kept_sets(shaken), 1) == kept).all(1)
    assert same.sum() >= count
    return images[same][:count]


@devices_and_here
@pytest.mark.parametrize(("name", "plan"), PAIRS)
def test_a_model_answers_like_the_reference(device, name, plan):
    dtype, where = use(device), place(device)
    images = steady_images(name, plan, dtype, 2)
    fast = fast_of(name, plan, dtype, where.type)
    exact, own = slim_of(name, plan, torch.float64), slim_of(name, plan, dtype)
    with torch.no_grad():
        for got, wanted in zip(
            fast.kept_sets(images.to(where)), exact.kept_sets(images.double()), strict=True
        ):
            assert got.tolist() == wanted.tolist()
        for call in ("forward", "forward_features"):
            wanted = getattr(exact, call)(images.double())
            torchs = distance(getattr(own, call)(images), wanted)
            got = getattr(fast, call)(images.to(where)).cpu()
            assert distance(got, wanted) <= max(2 * torchs, 5 * FLOOR[dtype])
    assert fast.backend == "cuda"


@devices
@pytest.mark.parametrize("plan", ["falling", "dps", "spvit"])
def test_every_image_by_itself(device, plan):
    dtype = use(device)
    images = random_images(model_of("deit"), 3)
    fast = fast_of("deit", plan, dtype)
    wanted = fast(images)
    images[1, 1, 20, 20] = math.nan
    got = fast(images)
    assert got[1].isnan().all()
    assert torch.equal(got[::2], wanted[::2])
    assert torch.equal(fast(images[2:]), wanted[2:])


def test_too_many_tokens_are_refused_ahead():
    use(A100)
    model = timm.create_model("test_vit", img_size=736, num_classes=5).eval()
    message = "block 2: it chooses among at most 2048 tokens, got 2117"
    with pytest.raises(SlimvitError, match=message):
        accelerate(model, Absorb(cut=0.3), backend="cuda", precision="float16")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (SPViT([0.7], stages=[1], argmax=True), "block 2: its selector keeps as many patches"),
        (Absorb(counts=[12, 8, 1], thresholds=[0.1] * 3), "block 1: it keeps as many patches as"),
    ],
    ids=str,
)
def test_plans_that_are_refused(plan, message):
    use(A100)
    with pytest.raises(SlimvitError, match=f"back end cuda does not compute this model: {message}"):
        accelerate(model_of("deit"), plan, backend="cuda", precision="float16")
