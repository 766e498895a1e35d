"""The block for inference against `slim_block`, packed on CPUs and plain."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimvit import models
from slimvit.backends.packed_linear import PackedLinear, PatchLinear, packable
from slimvit.ops import ExtraKey, FoldedBlock, slim_block

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def without_dropout(block):
    mlp = nn.Sequential(block.mlp.fc1, block.mlp.act, block.mlp.fc2)
    return block._replace(mlp=mlp)


@pytest.fixture
def block(tiny_vit):
    return without_dropout(models.block_parts(tiny_vit)[1])


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, keep, batch", [(1, 1, 1), (17, 17, 3), (63, 40, 1), (197, 1, 3)])
def test_folded_block_is_slim_block(block, dtype, m, keep, batch, poison_empty):
    parts = block._replace(qkv=block.qkv)
    assert FoldedBlock.why_not(parts) is None
    torch.manual_seed(m)
    x = torch.randn(m, batch, parts.qkv.in_features)
    reference = copy.deepcopy(nn.ModuleList(p for p in parts if isinstance(p, nn.Module))).double()
    modules = iter(reference)
    exact = parts._replace(
        **{n: next(modules) for n, p in parts._asdict().items() if isinstance(p, nn.Module)}
    )
    wanted = slim_block(x.double(), exact, keep)
    folded = FoldedBlock(parts).to(dtype)
    with torch.inference_mode():
        got = folded(x.to(dtype), keep)
        own = error(slim_block(x.to(dtype), _in(parts, dtype), keep), wanted)
    assert got.shape == (keep, batch, x.shape[-1])
    assert error(got, wanted) <= 2 * own + 1e-12


def _in(parts, dtype):
    moved = {
        n: copy.deepcopy(p).to(dtype)
        for n, p in parts._asdict().items()
        if isinstance(p, nn.Module)
    }
    return parts._replace(**moved)


def test_extra_key(block):
    x = torch.randn(9, 2, block.qkv.in_features)
    shape = (1, block.heads, 1, block.head_dim)
    extra = ExtraKey(torch.randn(shape), torch.randn(shape), 1.5)
    with torch.no_grad():
        wanted = slim_block(x, block, 4, extra_key=extra)
        torch.testing.assert_close(FoldedBlock(block)(x, 4, extra), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", [nn.GELU("tanh"), nn.SiLU(), nn.ReLU()])
def test_other_activations(block, act):
    parts = block._replace(mlp=nn.Sequential(block.mlp[0], act, block.mlp[2]))
    x = torch.randn(9, 2, parts.qkv.in_features)
    with torch.no_grad():
        torch.testing.assert_close(
            FoldedBlock(parts)(x, 5), slim_block(x, parts, 5), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    "name, part, reason",
    [
        ("q_norm", nn.LayerNorm(32), "it has q_norm, a LayerNorm"),
        ("ls1", nn.Linear(1, 1), "it has ls1, a Linear"),
        ("gate", nn.Linear(1, 1), "its attention is gated"),
        ("norm1", nn.RMSNorm(64), "its norm is RMSNorm, not LayerNorm with weights"),
        ("norm2", nn.LayerNorm(64, elementwise_affine=False), "its norm is LayerNorm"),
        ("mlp", nn.Linear(1, 1), "its MLP is Linear, not two layers and an activation"),
        ("proj", nn.Identity(), "it has Identity in place of Linear"),
    ],
)
def test_what_is_not_plain_is_not_folded(block, name, part, reason):
    assert FoldedBlock.why_not(block._replace(**{name: part})).startswith(reason)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_packed_linear(bias, packed):
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias)
    layer = PackedLinear(linear.weight, linear.bias)
    x, residual = torch.randn(5, 3, 24), torch.randn(5, 3, 40)
    assert packable(x)
    with torch.no_grad():
        y = linear(x)
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(layer(x, packed=packed), y, **close)
        torch.testing.assert_close(layer(x, packed=packed, gelu=True), F.gelu(y), **close)
        torch.testing.assert_close(layer(x, packed=packed, add=residual), y + residual, **close)
        rows = slice(8, 24)
        torch.testing.assert_close(layer(x, rows, packed=packed), y[..., rows], **close)


def test_pack_follows_its_weight():
    """In-place changes, loading, moves and copies must not leave an old pack in use."""
    linear = nn.Linear(16, 16)
    layer, x = PackedLinear(linear.weight, linear.bias), torch.randn(4, 16)
    before = layer(x, packed=True)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.bias.zero_()
    torch.testing.assert_close(layer(x, packed=True), layer(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other(x, packed=True), before)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x, packed=True), layer(x), rtol=1e-5, atol=1e-5)
    layer.to(torch.bfloat16)
    assert layer(x.bfloat16(), packed=True).dtype == torch.bfloat16


def test_model_built_in_inference_mode_is_not_packed():
    with torch.inference_mode():
        layer, x = PackedLinear(torch.randn(8, 4), torch.randn(8)), torch.randn(2, 4)
        before = layer(x, packed=True)
        layer.weight.zero_()
        assert not torch.equal(layer(x, packed=True), before)


def test_packing_is_for_inference_on_cpus():
    x = torch.randn(2, 3)
    assert packable(x)
    assert not packable(x.double())
    assert not packable(x.clone().requires_grad_())
    assert not packable(x.to("meta"))
    with torch.autograd.forward_ad.dual_level():
        assert not packable(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not packable(x)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not packable(x)


@pytest.mark.parametrize(
    "patch, size", [((16, 16), (48, 32)), ((4, 8), (8, 8)), ((14, 14), (14, 42))]
)
def test_patch_linear_is_the_convolution(patch, size):
    convolution = nn.Conv2d(3, 10, patch, patch)
    assert PatchLinear.replaces(convolution)
    images = torch.randn(3, 3, *size).transpose(0, 1).contiguous().transpose(0, 1)
    with torch.no_grad():
        got = PatchLinear(convolution)(images)
        torch.testing.assert_close(got, convolution(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [nn.Conv2d(3, 4, 4, 2), nn.Conv2d(3, 4, 4, 4, padding=1), nn.Conv2d(4, 4, 2, 2, groups=2)],
)
def test_other_convolutions_stay(other):
    assert not PatchLinear.replaces(other)
