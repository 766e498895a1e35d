"""Eq. 6: the recursion against all head paths, the scores against a model taken apart by hand."""

import itertools

import pytest
import torch

from slimvit import models
from slimvit.search.features import Features
from slimvit.search.layer import score_layer
from slimvit.search.paths import last_moment, step_moment
from slimvit.search.scores import SCORES, LayerView, attention, eq6, random


def every_path(maps: list[torch.Tensor], kept: list[torch.Tensor]) -> torch.Tensor:
    """Σ over head paths of the squared column norms of diag(m_L) P_L … diag(m_t) P_t: [b, N]."""
    heads, tokens = maps[0].shape[1], maps[0].shape[2]
    total = torch.zeros(len(maps[0]), tokens, dtype=maps[0].dtype)
    for path in itertools.product(range(heads), repeat=len(maps)):
        product = torch.eye(tokens, dtype=maps[0].dtype)
        for p, keep, head in zip(maps, kept, path, strict=True):  # from block L down
            product = product @ (keep.to(p)[:, None] * p[:, head])
        total += product.square().sum(1)
    return total


@pytest.mark.parametrize("heads, depth, tokens", [(1, 3, 5), (2, 4, 7), (3, 3, 1)])
def test_recursion_sums_over_all_head_paths(heads, depth, tokens):
    torch.manual_seed(1)
    maps = [torch.rand(2, heads, tokens, tokens).double().softmax(-1) for _ in range(depth)]
    kept, alive = [], torch.arange(tokens) < 1
    for _ in range(depth):
        kept.append(alive)
        alive = alive | (torch.rand(tokens) < 0.4)
    moment = last_moment(2, tokens, maps[0])
    for above in range(depth):
        moment = step_moment(moment, maps[above], kept[above].nonzero().squeeze(1))
        expected = every_path(maps[: above + 1], kept[: above + 1])
        expected = expected / expected.sum(1, keepdim=True)
        torch.testing.assert_close(moment.diagonal(dim1=1, dim2=2), expected)


def attention_maps(model: torch.nn.Module, images: torch.Tensor):
    """Inputs and softmax attention of every block, by timm's own modules: Z_{t-1}, P_t."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for block in model.blocks:
        attn = block.attn
        b, n, _ = x.shape
        qkv = attn.qkv(block.norm1(x)).reshape(b, n, 3, attn.num_heads, attn.head_dim)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        yield x, (attn.q_norm(q) * attn.scale @ attn.k_norm(k).transpose(-2, -1)).softmax(-1)
        x = block(x)


@torch.no_grad()
def test_scores_of_a_model_follow_the_formula(tiny_vit):
    model = tiny_vit.double()
    images = torch.randn(3, 3, 64, 64, dtype=torch.double)
    inputs, maps = zip(*attention_maps(model, images), strict=True)
    features = Features(model, [images[:2], images[2:]], cache_bytes=1 << 20, progress=False)
    dense, tokens = models.block_parts(model), maps[0].shape[-1]
    kept = torch.arange(tokens) < 1
    chain_maps, chain_kept = [], []
    for index in range(len(dense) - 1, 1, -1):
        got = score_layer(
            features, index, dense, kept.nonzero().squeeze(1), eq6, tokens=tokens, seed=0
        )
        chain_maps.append(maps[index])
        chain_kept.append(kept)
        u = maps[index - 1] @ inputs[index - 1].abs().unsqueeze(1)
        score = every_path(chain_maps, chain_kept) * u.square().sum((1, 3))
        expected = (score / score.sum(1, keepdim=True)).mean(0)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)
        kept = kept | (torch.rand(tokens) < 0.3)


def view(**changes) -> LayerView:
    torch.manual_seed(0)
    values = {
        "layer": 2,
        "attention": torch.rand(2, 3, 5, 5).softmax(-1),
        "inputs": torch.randn(2, 5, 4),
        "paths": torch.rand(2, 5),
        "seed": 7,
    }
    return LayerView(**(values | changes))


def test_attention_scores_columns():
    p = torch.zeros(1, 1, 4, 4)
    p[..., 2] = 1.0
    assert attention(view(attention=p)).argmax() == 2


def test_random_depends_on_the_seed_only():
    first = random(view())
    assert torch.equal(first[0], first[1])
    assert torch.equal(first, random(view(layer=5)))
    assert not torch.equal(first, random(view(seed=8)))


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_per_image_and_positive(name):
    score = SCORES[name](view())
    assert score.shape == (2, 5)
    assert (score > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("score", [eq6, attention])
def test_squares_beyond_float16(dtype, score):
    """A channel of 300, as DINOv2 and CLIP have them."""
    given = view()
    low = [part.to(dtype) for part in (given.attention, 300 + given.inputs, given.paths)]
    got = score(given._replace(attention=low[0], inputs=low[1], paths=low[2]))
    wide = [part.double() for part in low]
    wanted = score(given._replace(attention=wide[0], inputs=wide[1], paths=wide[2]))
    torch.testing.assert_close(got.double(), wanted, rtol=0.02, atol=0)
