"""Averages of absorbed tokens, and the highest scores, against naive loops."""

import pytest
import torch
from references import off
from torch import Tensor

from slimvit.ops import Alive, Choice, complement, top
from slimvit.ops.dynamic_block import absorb_tokens

EXACT = 1e-12
SIZES = [(1, 1), (2, 1), (2, 2), (63, 20), (63, 62), (197, 1), (197, 104), (197, 197)]


def some_alive(batch: int, m: int, sizes: bool, width: int = 48, seed: int = 0) -> Alive:
    """Tokens [m, B, width] in float64 with places of a longer sequence, whole sizes and spreads."""
    generator = torch.Generator().manual_seed(seed + m)
    x = torch.randn(m, batch, width, generator=generator, dtype=torch.float64)
    orders = [torch.randperm(2 * m, generator=generator)[:m] for _ in range(batch)]
    place = torch.stack(orders).sort(1).values
    if not sizes:
        return Alive(x, place)
    size = torch.randint(1, 9, (batch, m), generator=generator).float()
    return Alive(x, place, size, spread=torch.rand(batch, m, generator=generator))


def some_choice(batch: int, m: int, n: int, prefix: int, absorbs: bool) -> Choice:
    """Random kept tokens, the prefix among them, and random ones that take the others in."""
    generator = torch.Generator().manual_seed(n)
    scores = torch.rand(batch, m, generator=generator)
    scores[:, :prefix] = 2
    index = scores.topk(n, 1).indices.sort(1).values
    if not absorbs:
        return Choice(index)
    into = torch.randint(0, n, (batch, m - n), generator=generator)
    return Choice(index, into, torch.rand(batch, m, generator=generator) + 0.1)


def absorbed(alive: Alive, choice: Choice) -> Alive:
    """absorb_tokens in loops over images, tokens and channels."""
    (m, batch, width), n = alive.x.shape, choice.index.shape[1]
    x = torch.zeros(n, batch, width, dtype=torch.float64)
    place = torch.zeros(batch, n, dtype=torch.int64)
    size, spread = torch.zeros(batch, n), torch.zeros(batch, n)
    for b in range(batch):
        kept = choice.index[b].tolist()
        pruned = [i for i in range(m) if i not in kept]
        for k, i in enumerate(kept):
            group = [i]
            if choice.into is not None:
                group += [j for j, into in zip(pruned, choice.into[b].tolist()) if into == k]
            sizes = [1.0 if alive.size is None else alive.size[b, j].item() for j in group]
            weights = sizes if choice.weight is None else choice.weight[b, group].tolist()
            x[k, b] = sum(w * alive.x[j, b] for w, j in zip(weights, group)) / sum(weights)
            for w, j in zip(weights, group, strict=True):
                apart = (alive.x[j, b] - x[k, b]).var(unbiased=False)
                own = 0.0 if alive.spread is None else alive.spread[b, j]
                spread[b, k] += w * (own + apart) / sum(weights)
            place[b, k], size[b, k] = alive.place[b, i], sum(sizes)
    return Alive(x, place, size, spread=spread)


class TestAbsorbTokens:
    @pytest.mark.parametrize(("m", "n"), SIZES)
    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("sizes", [False, True])
    @pytest.mark.parametrize("absorbs", [False, True])
    def test_equals_loops(self, poison_empty, m, n, batch, sizes, absorbs):
        alive = some_alive(batch, m, sizes, width=5)
        choice = some_choice(batch, m, n, 1, absorbs)
        for each in (choice, choice._replace(weight=None)):
            got, wanted = absorb_tokens(alive, each), absorbed(alive, each)
            assert torch.equal(got.place, wanted.place)
            assert got.x.dtype == torch.float64
            assert off(got.x, wanted.x) < 1e-7  # weights are float32
            if absorbs or sizes:
                assert (got.spread - wanted.spread).abs().max() < 1e-6
        if absorbs or sizes:
            assert off(got.size, wanted.size) < 1e-6
        else:
            assert got.size is None

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_rounds_once(self, dtype):
        alive = some_alive(2, 63, True, width=5)
        alive = alive._replace(x=alive.x.to(dtype))
        choice = some_choice(2, 63, 20, 1, True)
        got = absorb_tokens(alive, choice)
        assert got.x.dtype == dtype
        wanted = absorbed(alive._replace(x=alive.x.double()), choice).x
        unit = torch.finfo(dtype).eps
        assert ((got.x - wanted).abs() <= unit * (wanted.abs() + 1)).all()

    def test_what_is_pruned_but_still_a_row_stays_so(self):
        alive, choice = some_alive(2, 9, True), some_choice(2, 9, 5, 1, False)
        policy = (torch.rand(2, 9) > 0.5).float()
        got = absorb_tokens(alive._replace(policy=policy), choice)
        assert torch.equal(got.policy, policy.gather(1, choice.index))

    def test_a_policy_is_not_averaged(self):
        alive = some_alive(2, 9, False)._replace(policy=torch.ones(2, 9))
        with pytest.raises(ValueError, match="into = None where the tokens have a policy"):
            absorb_tokens(alive, some_choice(2, 9, 4, 1, True))

    def test_no_token_is_lost(self):
        alive, choice = some_alive(3, 63, True), some_choice(3, 63, 7, 2, True)
        got = absorb_tokens(alive, choice)
        assert torch.equal(got.size.sum(1), alive.size.sum(1))
        got = absorb_tokens(alive, choice._replace(weight=None))
        for total in (self.of_tokens, self.of_squares):
            assert (total(got) - total(alive)).abs().max() < 1e-5 * total(alive).abs().max()

    def of_tokens(self, alive: Alive) -> Tensor:
        return (alive.size.t().unsqueeze(2) * alive.x).sum(0)

    def of_squares(self, alive: Alive) -> Tensor:
        """What averages lose of the variance is their spread."""
        return (alive.size * (alive.spread + alive.x.var(2, unbiased=False).t())).sum(1)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_a_token_that_nothing_goes_into_stays_as_it_is(self, dtype):
        alive, choice = some_alive(2, 63, True), some_choice(2, 63, 40, 1, True)
        alive = alive._replace(x=alive.x.to(dtype))
        got = absorb_tokens(alive, choice)
        for b in range(2):
            alone = [k for k in range(40) if k not in choice.into[b].tolist()]
            assert len(alone) > 10
            same = choice.index[b][alone]
            assert torch.equal(got.x[alone, b], alive.x[same, b])
            assert torch.equal(got.spread[b, alone], alive.spread[b, same])

    def test_gradients(self):
        alive, choice = some_alive(2, 7, True, width=3), some_choice(2, 7, 3, 1, True)
        x = alive.x.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x: absorb_tokens(alive._replace(x=x), choice).x, x, fast_mode=True
        )


def ranked(scores: Tensor, n: int, prefix: int) -> Tensor:
    """`top` in a loop: prefix first, then by score, NaN last, earlier ones first."""
    rows = []
    for row in scores.tolist():
        keys = [-float("inf") if value != value else value for value in row]
        order = sorted(range(prefix, len(row)), key=lambda i: (-keys[i], i))
        rows.append(sorted([*range(prefix), *order][:n]))
    return torch.tensor(rows)


class TestTop:
    @pytest.mark.parametrize("m", [2, 3, 63, 197])
    @pytest.mark.parametrize("prefix", [0, 1, 2, 5])
    def test_equals_sorting(self, m, prefix):
        scores = torch.randn(3, m, generator=torch.Generator().manual_seed(m))
        for n in sorted({*range(prefix, min(prefix + 3, m)), m // 2, m - 1, m}):
            if prefix <= n <= m and n > 0:
                assert torch.equal(top(scores, n, prefix), ranked(scores, n, prefix)), n

    @pytest.mark.parametrize("m", [17, 63, 300])
    def test_among_equals_the_earlier(self, m):
        generator = torch.Generator().manual_seed(0)
        scores = torch.randint(0, 3, (5, m), generator=generator).float()
        for n in range(2, m, 7):
            assert torch.equal(top(scores, n, 1), ranked(scores, n, 1)), n
        alike = top(torch.zeros(2, m), 9, 2)
        assert torch.equal(alike, torch.arange(9).expand(2, -1))

    def test_nan_is_the_lowest_and_infinity_the_highest_but_the_prefix(self):
        nan, inf = float("nan"), float("inf")
        scores = torch.tensor([[nan, -inf, inf, nan, 3.0, -inf, inf, 1e38, -1e38]])
        for n in range(2, 9):
            assert torch.equal(top(scores, n, 2), ranked(scores, n, 2)), n
        assert top(scores, 4, 2).tolist() == [[0, 1, 2, 6]]
        assert top(torch.full((1, 6), nan), 3, 1).tolist() == [[0, 1, 2]]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_leaves_scores_alone(self, dtype):
        scores = torch.randn(2, 63, dtype=dtype, requires_grad=True)
        before = scores.detach().clone()
        assert torch.equal(top(scores, 9, 1), ranked(before, 9, 1))
        assert torch.equal(scores.detach(), before)

    def test_an_image_is_ranked_alone(self):
        scores = torch.randint(0, 5, (6, 63)).float()
        alone = [top(row[None], 20, 1) for row in scores]
        assert torch.equal(top(scores, 20, 1), torch.cat(alone))


@pytest.mark.parametrize(("m", "n"), SIZES)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_complement(m, n, batch):
    index = some_choice(batch, m, n, 0, False).index
    got = complement(index, m)
    assert got.shape == (batch, m - n)
    for kept, pruned in zip(index.tolist(), got.tolist(), strict=True):
        assert pruned == [i for i in range(m) if i not in kept]
