"""slim_block against timm's blocks: slim_block(x, kept) == block(x)[:, kept], whatever is kept."""

import pytest
import torch
from references import MODELS, build, off
from torch import Tensor, nn

from slimvit.models import block_parts
from slimvit.ops import BlockParts, ExtraKey, slim_block, zero_key

KINDS = MODELS.keys() & {
    "deit",
    "dinov2_swiglu",
    "clip_quickgelu",
    "qk_norm",
    "rms_norm",
    "scale_norms",
    "no_biases",
    "gated",
}
SIZES = [(1, 1), (63, 1), (63, 63), (63, 40), (197, 1), (197, 104), (197, 196), (197, 197)]
EXACT = 1e-12


def rows(batch: int, tokens: int, width: int = 48) -> Tensor:
    """[tokens, batch, width], float64: tokens first, as slim_block takes them."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, batch, width, generator=generator, dtype=torch.float64)


def kept_sets(batch: int, tokens: int, n: int) -> dict[str, int | Tensor]:
    generator = torch.Generator().manual_seed(n)
    orders = [torch.randperm(tokens, generator=generator)[:n] for _ in range(batch)]
    return {"prefix": n, "n": orders[0], "Bn": torch.stack(orders)}


def pick(x: Tensor, keep: int | Tensor) -> Tensor:
    """x[:, keep] of [B, N, D]."""
    if isinstance(keep, int):
        return x[:, :keep]
    if keep.dim() == 1:
        return x[:, keep]
    return torch.stack([image[index] for image, index in zip(x, keep, strict=True)])


def images_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


@torch.no_grad()
def dense(block: nn.Module, x: Tensor, key_bias: Tensor | None = None) -> Tensor:
    """timm's block on [N, B, D]; returns [B, N, D]."""
    if key_bias is None:
        return block(images_first(x))
    tokens, batch, _ = x.shape
    bias = key_bias.view(-1, 1, 1, tokens).expand(batch, 1, tokens, tokens)
    return block(images_first(x), attn_mask=bias)


def equal_logits() -> BlockParts:
    """A block in bfloat16 whose keys all weigh the same, and whose MLP adds nothing."""
    linear, identity = nn.Linear(8, 24, bias=False, dtype=torch.bfloat16), nn.Identity()
    mlp, proj = (nn.Linear(8, 8, bias=False, dtype=torch.bfloat16) for _ in range(2))
    for zero in (linear, mlp):
        nn.init.zeros_(zero.weight)
    nn.init.eye_(proj.weight)
    nones = dict.fromkeys(BlockParts._fields, identity)
    own = {"qkv": linear, "proj": proj, "mlp": mlp, "gate": None, "attn_drop": 0.0}
    return BlockParts(**{**nones, **own, "heads": 1, "head_dim": 8})


def double_block(kind: str):
    model = build(kind).double()
    return model.blocks[1], block_parts(model)[1]


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_blocks_rows(poison_empty, kind, batch):
    block, parts = double_block(kind)
    for tokens, n in SIZES:
        x = rows(batch, tokens)
        wanted = dense(block, x)
        for name, keep in kept_sets(batch, tokens, n).items():
            with torch.no_grad():
                got = slim_block(x, parts, keep)
            assert off(images_first(got), pick(wanted, keep)) < EXACT, (name, tokens, n)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errs_no_more_than_the_block(kind, dtype):
    x = rows(3, 197).to(dtype)
    model = build(kind).to(dtype)
    with torch.no_grad():
        own = dense(model.blocks[1], x)
        slim = {
            name: (keep, slim_block(x, block_parts(model)[1], keep))
            for name, keep in kept_sets(3, 197, 104).items()
        }
    wanted = dense(model.double().blocks[1], x.double())
    for name, (keep, got) in slim.items():
        assert got.dtype == dtype
        torchs = off(pick(own, keep), pick(wanted, keep))
        assert off(images_first(got), pick(wanted, keep)) <= 2 * torchs, name


def test_not_contiguous():
    block, parts = double_block("deit")
    x = rows(3, 63).transpose(0, 1).contiguous().transpose(0, 1)
    assert not x.is_contiguous()
    for keep in kept_sets(3, 63, 40).values():
        with torch.no_grad():
            got = slim_block(x, parts, keep)
        assert off(images_first(got), pick(dense(block, x), keep)) < EXACT


def test_input_is_left_alone():
    _, parts = double_block("scale_norms")
    x = rows(2, 63)
    before = x.clone()
    for keep in kept_sets(2, 63, 40).values():
        slim_block(x, parts, keep)
        assert torch.equal(x, before)


@pytest.mark.parametrize("keep", [64, 1000])
def test_more_than_are_alive(keep):
    _, parts = double_block("deit")
    with pytest.raises(ValueError, match=f"at most m = 63, the alive tokens, got {keep}"):
        slim_block(rows(1, 63), parts, keep)


@pytest.mark.parametrize("kind", ["deit", "qk_norm", "dinov2_swiglu"])
@pytest.mark.parametrize("per_image", [False, True])
def test_key_bias(kind, per_image):
    block, parts = double_block(kind)
    x = rows(3, 63)
    key_bias = torch.randn(3, 63, dtype=torch.float64) if per_image else torch.randn(63).double()
    wanted = dense(block, x, key_bias)
    assert off(wanted, dense(block, x)) > 1e-2
    for keep in kept_sets(3, 63, 40).values():
        with torch.no_grad():
            got = slim_block(x, parts, keep, key_bias=key_bias)
        assert off(images_first(got), pick(wanted, keep)) < EXACT


class TestZeroKey:
    @pytest.mark.parametrize("kind", sorted(KINDS))
    @pytest.mark.parametrize("dead", [1, 2, 97, 1000])
    def test_equals_zero_rows(self, kind, dead):
        block, parts = double_block(kind)
        x = rows(3, 63)
        wanted = dense(block, torch.cat([x, x.new_zeros(dead, 3, 48)]))
        for keep in kept_sets(3, 63, 40).values():
            with torch.no_grad():
                got = slim_block(x, parts, keep, extra_key=zero_key(parts, dead, x))
            assert off(images_first(got), pick(wanted, keep)) < EXACT

    @pytest.mark.parametrize("per_image", [False, True])
    def test_beside_a_key_bias(self, per_image):
        block, parts = double_block("deit")
        x = rows(3, 63)
        key_bias = torch.randn(3 if per_image else 1, 63, dtype=torch.float64)
        wanted = dense(
            block,
            torch.cat([x, x.new_zeros(20, 3, 48)]),
            torch.cat([key_bias, key_bias.new_zeros(len(key_bias), 20)], dim=1),
        )
        key_bias = key_bias if per_image else key_bias[0]
        with torch.no_grad():
            got = slim_block(x, parts, 40, key_bias=key_bias, extra_key=zero_key(parts, 20, x))
        assert off(images_first(got), wanted[:, :40]) < EXACT

    @pytest.mark.parametrize("dead", [2, 3, 66, 97, 150, 196])
    def test_is_counted_exactly_in_bfloat16(self, dead):
        """log(dead) is rounded by up to 1 % there; the weight of the key must not be."""
        x = torch.zeros(2 * dead, 1, 8, dtype=torch.bfloat16)
        value = torch.ones(1, 1, 1, 8, dtype=torch.bfloat16)
        extra = ExtraKey(torch.zeros_like(value), value, zero_key(equal_logits(), dead, x).bias)
        with torch.no_grad():
            got = slim_block(x, equal_logits(), 1, extra_key=extra)
        assert got[0, 0, 0].item() == torch.tensor(1 / 3).bfloat16().item()

    def test_gradients_reach_it(self):
        model = build("deit").double()
        parts, x = block_parts(model)[1], rows(1, 5)
        slim_block(x, parts, 3, extra_key=zero_key(parts, 7, x)).sum().backward()
        with_key = model.blocks[1].norm1.bias.grad.clone()
        model.zero_grad()
        x = torch.cat([x, torch.zeros(7, 1, 48, dtype=torch.float64)])
        model.blocks[1](images_first(x))[:, :3].sum().backward()
        assert off(with_key[None], model.blocks[1].norm1.bias.grad[None]) < EXACT


@pytest.mark.parametrize("keep", ["prefix", "n", "Bn"])
def test_gradients(keep):
    _, parts = double_block("deit")
    x = rows(2, 4)[:, :, :48].requires_grad_()
    kept = kept_sets(2, 4, 3)[keep]
    key_bias = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    extra = zero_key(parts, 5, x)

    def run(x, key_bias):
        return slim_block(x, parts, kept, key_bias=key_bias, extra_key=extra)

    assert torch.autograd.gradcheck(run, (x, key_bias), fast_mode=True)
