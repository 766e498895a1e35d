"""A block that chooses its tokens, against slim_block and timm's blocks."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from references import build, off
from test_absorb_tokens import EXACT, absorbed, ranked, some_alive, some_choice
from torch import Tensor, nn

from slimvit.dynamic import Absorb
from slimvit.models import block_parts
from slimvit.ops import Alive, Choice, View, dynamic_block, slim_block

KINDS = ["deit", "dinov2_swiglu", "qk_norm", "scale_norms", "no_biases"]


def parts_of(kind: str, layer: int = 1):
    model = build(kind).double()
    return model.blocks[layer], block_parts(model)[layer]


def always(choice: Choice) -> Callable[..., Choice]:
    return lambda *_: choice


def wide_norm(norm: nn.LayerNorm, x: Tensor, spread: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm of tokens [m, B, D] with a spread, and the spread after it, [m, B, 1]."""
    centred = x - x.mean(2, keepdim=True)
    spread = torch.zeros(x.shape[:2]) if spread is None else spread.t()
    square = centred.square().mean(2, keepdim=True) + spread.unsqueeze(2) + norm.eps
    return centred / square.sqrt() * norm.weight + norm.bias, spread.unsqueeze(2) / square


def by_definition(block: nn.Module, alive: Alive, merged: Alive) -> Tensor:
    """timm's block of merged tokens that see the alive ones; the mean of GELU by quadrature."""
    attn, heads = block.attn, block.attn.num_heads
    keys, _ = wide_norm(block.norm1, alive.x, alive.spread)
    queries, _ = wide_norm(block.norm1, merged.x, merged.spread)
    k, v = (
        part.unflatten(2, (heads, -1)).permute(1, 2, 0, 3)
        for part in attn.qkv(keys).chunk(3, 2)[1:]
    )
    q = attn.qkv(queries).chunk(3, 2)[0].unflatten(2, (heads, -1)).permute(1, 2, 0, 3)
    logits = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    if alive.size is not None:
        logits = logits + alive.size.double().log()[:, None, None, :]
    a = (logits.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)
    x = merged.x + attn.proj(a)
    y, share = wide_norm(block.norm2, x, merged.spread)
    fc1 = block.mlp.fc1
    deviation = (share * (fc1.weight * block.norm2.weight).square().sum(1)).sqrt()
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    total = sum(w * F.gelu(fc1(y) + deviation * p) for p, w in zip(points, weights / weights.sum()))
    return x + block.mlp.fc2(total)


class TestDynamicBlock:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("m", "n"), [(2, 1), (63, 20), (63, 63), (197, 104), (197, 1)])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_without_absorbing_is_slim_block(self, poison_empty, kind, m, n, batch):
        _, block = parts_of(kind)
        for sizes in (False, True):
            alive = some_alive(batch, m, sizes)
            choice = some_choice(batch, m, n, 1, False)
            with torch.no_grad():
                got = dynamic_block(alive, block, n, always(choice), prefix=1)
                index = choice.index
                assert not sizes or torch.equal(got.spread, alive.spread.gather(1, index))
                alive = alive._replace(spread=None)
                got = dynamic_block(alive, block, n, always(choice), prefix=1)
                bias = alive.size.double().log() if sizes else None
                wanted = slim_block(alive.x, block, index, key_bias=bias)
            assert off(got.x, wanted) < (1e-6 if sizes else EXACT)  # sizes are float32
            assert torch.equal(got.place, alive.place.gather(1, index))
            assert (got.size is None) == (not sizes)
            assert not sizes or torch.equal(got.size, alive.size.gather(1, index))

    @pytest.mark.parametrize("n", [1, 2, 4, 9])
    def test_nothing_is_asked_where_there_is_no_choice(self, n):
        _, block = parts_of("deit")
        alive = some_alive(2, 9, True)

        def refuse(*_):
            raise AssertionError("it was asked")

        got = dynamic_block(alive, block, n, refuse, prefix=4)
        assert torch.equal(got.spread, alive.spread[:, :n])
        alive = alive._replace(spread=None)
        got = dynamic_block(alive, block, n, refuse, prefix=4)
        bias = alive.size.log().double()
        assert off(got.x, slim_block(alive.x, block, n, key_bias=bias)) < EXACT
        assert torch.equal(got.place, alive.place[:, :n])
        assert torch.equal(got.size, alive.size[:, :n])

    @pytest.mark.parametrize("sizes", [False, True])
    def test_absorbing_merges_before_the_queries(self, sizes):
        block, parts = parts_of("deit")
        alive, choice = some_alive(2, 9, sizes), some_choice(2, 9, 4, 1, True)
        with torch.no_grad():
            got = dynamic_block(alive, parts, 4, always(choice), prefix=1).x
            wanted = by_definition(block, alive, absorbed(alive, choice))
        assert off(got, wanted) < 1e-6

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("prefix", [1, 2, 5])
    def test_absorbed_duplicates_change_nothing(self, kind, prefix):
        """Tokens that are twins of others stay counted by log(size), block after block."""
        blocks, parts = build(kind).double().blocks, block_parts(build(kind).double())
        x, twin = twins(prefix, patches=12)
        alive = Alive(x, torch.arange(len(twin)).expand(x.shape[1], -1))
        for layer in range(3):
            n = len(set(twin[: alive.x.shape[0]])) if layer == 0 else alive.x.shape[0]
            choice = absorb_twins(twin, x.shape[1])
            with torch.no_grad():
                x = blocks[layer](x.transpose(0, 1)).transpose(0, 1)
                alive = dynamic_block(alive, parts[layer], n, always(choice), prefix=prefix)
            rows = torch.stack([x[place, b] for b, place in enumerate(alive.place)], 1)
            assert off(alive.x, rows) < 1e-6, layer  # sizes are float32
        assert alive.x.shape[0] == len(set(twin)) < len(twin)

    def test_a_stale_size_would_change_it(self):
        """What the test above relies on: without log(size) the answers differ."""
        block, parts = parts_of("deit")
        x, twin = twins(1, 12)
        choice = absorb_twins(twin, x.shape[1])
        alive = Alive(x, torch.arange(len(twin)).expand(x.shape[1], -1))
        n = choice.index.shape[1]
        with torch.no_grad():
            first = dynamic_block(alive, parts, n, always(choice), prefix=1)
            right = dynamic_block(first, parts, n, always(choice), prefix=1)
            wrong = dynamic_block(first._replace(size=None), parts, n, always(choice), prefix=1)
        assert off(wrong.x, right.x) > 1e-3

    def test_more_than_there_are(self):
        _, block = parts_of("deit")
        with pytest.raises(ValueError, match="at most m = 9, the alive tokens, got 10"):
            dynamic_block(some_alive(1, 9, False), block, 10, View.top, prefix=1)

    @pytest.mark.parametrize("shape", [(2, 4), (2, 6), (1, 5), (5,)])
    def test_a_choice_of_another_number(self, shape):
        _, block = parts_of("deit")
        choice = Choice(torch.zeros(shape, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"index \[B, n\] = \[2, 5\], got"):
            dynamic_block(some_alive(2, 9, False), block, 5, always(choice), prefix=1)

    def test_takers_of_another_number(self):
        _, block = parts_of("deit")
        choice = some_choice(2, 9, 5, 1, True)
        choice = choice._replace(into=choice.into[:, 1:])
        with pytest.raises(ValueError, match=r"into \[B, m - n\] = \[2, 4\], got \[2, 3\]"):
            dynamic_block(some_alive(2, 9, False), block, 5, always(choice), prefix=1)


def twins(prefix: int, patches: int, batch: int = 2) -> tuple[Tensor, list[int]]:
    """Tokens [m, B, 48], some patches equal to earlier ones; for each its first twin, or itself."""
    generator = torch.Generator().manual_seed(prefix)
    m = prefix + patches
    x = torch.randn(m, batch, 48, generator=generator, dtype=torch.float64)
    twin = list(range(m))
    for later, earlier in ((5, 2), (7, 2), (8, 3), (11, 9)):
        twin[prefix + later] = prefix + earlier
        x[prefix + later] = x[prefix + earlier]
    return x, twin


def absorb_twins(twin: list[int], batch: int) -> Choice:
    kept = [i for i, first in enumerate(twin) if first == i]
    into = [kept.index(first) for i, first in enumerate(twin) if first != i]
    index = torch.tensor(kept)
    return Choice(index.expand(batch, -1), torch.tensor(into).expand(batch, -1))


class TestView:
    @pytest.mark.parametrize("kind", ["deit", "qk_norm", "no_biases"])
    @pytest.mark.parametrize("sizes", [False, True])
    @pytest.mark.parametrize("policy", [False, True])
    @pytest.mark.parametrize("head_tokens", [1, 2])
    def test_attention(self, kind, sizes, head_tokens, policy):
        _, block = parts_of(kind)
        alive = some_alive(3, 17, sizes)
        if policy:
            alive = alive._replace(policy=(torch.arange(17) % 3 != 2).float().expand(3, -1))
        y = block.norm1(alive.x)
        view = View(alive, block, y, 2, head_tokens)
        q, k, v = block.qkv(y).view(17, 3, 3, block.heads, block.head_dim).permute(2, 1, 3, 0, 4)
        q, k = block.q_norm(q), block.k_norm(k)
        assert off(view.keys, k) < EXACT
        assert off(view.values, v) < EXACT
        logits = q @ k.transpose(2, 3) / block.head_dim**0.5
        if sizes:
            logits = logits + alive.size.log()[:, None, None, :]
        if policy:
            logits[..., 2::3] = -torch.inf
        assert off(view.attention(), logits.softmax(-1)) < EXACT
        wanted = logits.softmax(-1)[:, :, :head_tokens].mean(2)
        assert off(view.class_attention(), wanted) < 1e-5  # it is float32
        size = alive.size if sizes else torch.ones(3, 17)
        assert torch.equal(view.size, size)

    def test_top(self):
        _, block = parts_of("deit")
        alive = some_alive(2, 17, False)
        view = View(alive, block, block.norm1(alive.x), 3, 1)
        scores = torch.randn(2, 17)
        assert torch.equal(view.top(scores, 8).index, ranked(scores, 8, 3))
        assert view.top(scores, 8).into is None


def absorb_in_loops(view: View, n: int) -> tuple[list, list, list]:
    """What Absorb chooses, by its formula, token by token: kept, into and weights."""
    alive, prefix = view.alive, view.prefix
    attention, values = view.class_attention().double(), view.values.double()
    y = view.y.double()
    kept, into, weights = [], [], []
    for b in range(alive.x.shape[1]):
        m = alive.x.shape[0]
        heads = range(values.shape[1])
        importance = [
            sum((attention[b, h, i] * values[b, h, i].norm()).item() for h in heads)
            for i in range(m)
        ]
        unit = [y[i, b] / y[i, b].norm() for i in range(m)]

        def cosine(i, j, unit=unit):
            return -1.0 if j < prefix else (unit[i] @ unit[j]).item()

        scores = []
        for i in range(m):
            ahead = [(-importance[j], j) < (-importance[i], i) for j in range(m)]
            above = [cosine(i, j) for j in range(m) if ahead[j]]
            scores.append(importance[i] ** 0.5 * (1 - max(above, default=-1.0)))
        order = sorted(range(prefix, m), key=lambda i: -scores[i])
        chosen = sorted([*range(prefix), *order][:n])
        others = [i for i in range(m) if i not in chosen]
        kept.append(chosen)
        into.append([max(range(n), key=lambda k: cosine(i, chosen[k])) for i in others])
        weights.append(importance)
    return kept, into, weights


@pytest.mark.parametrize(("m", "n", "prefix"), [(3, 2, 1), (17, 6, 1), (40, 39, 2), (63, 9, 5)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sizes", [False, True])
def test_absorb_chooses_as_its_formula_says(m, n, prefix, batch, sizes):
    _, block = parts_of("deit")
    alive = some_alive(batch, m, sizes)
    view = View(alive, block, block.norm1(alive.x), prefix, min(prefix, 2))
    with torch.no_grad():
        choice = Absorb(counts=[1]).choose(0, view, n)
        kept, into, weights = absorb_in_loops(view, n)
    assert choice.index.tolist() == kept
    assert choice.into.tolist() == into
    assert off(choice.weight, torch.tensor(weights)) < 1e-5
