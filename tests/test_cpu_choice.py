"""The C++ block that chooses its tokens, against dynamic_block in float64."""

import functools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import DTYPES, isa  # noqa: F401
from predictors import check_predictors, predictor_of
from references import off
from test_cpu_block import FLOOR, Case, cast, make_parts
from torch import Tensor

from slimvit.ops import (
    AbsorbParts,
    Alive,
    BlockParts,
    Choice,
    ChooserParts,
    FoldedBlock,
    PredictorParts,
    View,
    candidates,
    complement,
    dynamic_block,
    pack_block,
    pack_chooser,
)
from slimvit.ops.slim_block import project_q


class Choosing(NamedTuple):
    """A block, its input and how it chooses: "attention" or "predictor"."""

    m: int
    n: int
    batch: int = 3
    prefix: int = 1
    heads: int = 2
    head_dim: int = 32
    width: int = 64
    scores: str = "attention"
    sizes: bool = True
    head_tokens: int = 1
    level: float = 0.0  # of all numbers that come in

    def __str__(self) -> str:
        shape = f"{self.prefix}_{self.heads}x{self.head_dim}_{self.width}"
        level = f"_{self.level}" if self.level else ""
        return f"{self.m}to{self.n}_{self.batch}_{shape}_{self.scores}{level}"

    @property
    def block(self) -> Case:
        return Case(
            self.m, self.n, self.batch, self.width, self.heads, self.head_dim, 2 * self.width
        )


CASES = [
    Choosing(3, 2, 1),
    Choosing(5, 3, 8, prefix=2, head_tokens=2),
    Choosing(5, 2, 3, sizes=False),
    Choosing(63, 2, 3, width=48, heads=3, head_dim=64),
    Choosing(63, 62, 8),
    Choosing(63, 40, 1, prefix=5, sizes=False),
    Choosing(197, 141, 1, width=192, heads=3, head_dim=64),
    Choosing(197, 6, 3, prefix=5, width=96, heads=1, head_dim=64),
    Choosing(257, 200, 3, prefix=2, head_tokens=2, heads=6, width=192),
    Choosing(257, 256, 1, head_dim=16, width=16),
    Choosing(63, 40, 3, level=30.0),
]
CASES += [CASES[i]._replace(scores="predictor") for i in (0, 1, 3, 5, 6, 8)]


def chooser_of(case: Choosing) -> ChooserParts:
    if case.scores == "attention":
        return AbsorbParts(case.head_tokens)
    return predictor_of(case.width)


@functools.cache
def block_of(case: Choosing, dtype: torch.dtype) -> BlockParts:
    return cast(make_parts(case.block), dtype)


def input_of(case: Choosing, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Tokens as `dtype` holds them, float32 [m, B, D], sizes and spreads."""
    generator = torch.Generator().manual_seed(case.m + case.batch)
    x = torch.randn(case.m, case.batch, case.width, generator=generator)
    x = x + torch.randn(1, case.batch, case.width, generator=generator)  # alike, as patches are
    x = x + case.level
    sizes = 1 + 3 * torch.rand(case.batch, case.m, generator=generator)
    spread = torch.rand(case.batch, case.m, generator=generator).clamp(min=0.3) - 0.3
    return x.to(dtype).float(), *((sizes, spread) if case.sizes else (None, None))


class Seen:
    """What a choice is made by, in the dtype of a view."""

    def __init__(self, case: Choosing, view: View) -> None:
        size = view.size.to(view.keys.dtype)
        if case.scores == "attention":
            q = project_q(view._block, view.y[: case.head_tokens])
            logits = (q @ view.keys.transpose(-2, -1)).double() * case.head_dim**-0.5
            attention = (logits + size.double().log()[:, None, None, :]).softmax(-1).mean(2)
            self.importance = (attention * view.values.double().norm(dim=-1)).sum(1)  # [B, m]
            like = F.normalize(view.y.transpose(0, 1).double(), dim=-1)
            self.cosine = like @ like.transpose(1, 2)  # [B, m, m]
            self.cosine[:, :, : case.prefix] = -1
            above = self.importance[:, None, :] > self.importance[:, :, None]
            nearest = self.cosine.masked_fill(~above, -1).amax(2)
            self.score = self.importance.sqrt() * (1 - nearest)
        else:
            parts = predictor_of(case.width)
            x = view.alive.x
            norm, down, out = (layer.to(x.dtype) for layer in (parts.norm, parts.down, parts.out))
            self.score = out(F.gelu(down(norm(x)))).squeeze(-1).t()
            for layer in (parts.norm, parts.down, parts.out):
                layer.double()
        self.score = self.score.double()

    def choice(self, case: Choosing, index: Tensor, into: Tensor) -> Choice:
        """That choice, with weights as they should be."""
        if case.scores == "predictor":
            return Choice(index)
        return Choice(index, into, self.importance)

    def candidates(self, case: Choosing, slack: Tensor) -> tuple[Tensor, Tensor]:
        """Patches that surely are, and those that may be, among the least in importance."""
        count = candidates(case.m, case.n, case.prefix)
        importance = self.importance.clone()
        importance[:, : case.prefix] = torch.inf
        border = importance.sort(1).values[:, count - 1 : count]
        slack = slack.amax(1, keepdim=True) + 1e-9
        return importance < border - slack, importance <= border + slack

    def between(self, a: Tensor, b: Tensor) -> Tensor:
        """Cosines of tokens a and b, [B, k] each."""
        rows = self.cosine.gather(1, a.unsqueeze(-1).expand(-1, -1, self.cosine.shape[2]))
        return rows.gather(2, b.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def answer(
    case: Choosing, dtype: torch.dtype, compute: torch.dtype, index: Tensor, into: Tensor
) -> tuple[Alive, Seen]:
    """The block in `compute` by that choice, and what it saw."""
    x, size, spread = input_of(case, dtype)
    place = torch.arange(case.m).expand(case.batch, -1)
    seen: list[Seen] = []

    def choose(view: View, n: int) -> Choice:
        seen.append(Seen(case, view))
        return seen[0].choice(case, index, into)

    out = dynamic_block(
        Alive(x.to(compute), place, size, spread=spread),
        cast(block_of(case, dtype), compute),
        case.n,
        choose,
        prefix=case.prefix,
        head_tokens=case.head_tokens,
    )
    return out, seen[0]


def call(case: Choosing, dtype: torch.dtype, **changes: object) -> tuple[Tensor, ...]:
    x, size, spread = input_of(case, dtype)
    given = {
        "x": x,
        "pack": pack_block(FoldedBlock(block_of(case, dtype)), None, dtype),
        "chooser": pack_chooser(chooser_of(case), case.width, dtype),
        "n": case.n,
        "prefix": case.prefix,
        "size": size,
        "spread": spread,
    }
    return torch.ops.slimvit.dynamic_block(**{**given, **changes})


@pytest.mark.usefixtures("isa", "poison_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
class TestAnswers:
    def test_errs_no_more_than_torch_by_its_choice(self, case, dtype):
        out, index, into, size, spread = call(case, dtype)
        wanted, _ = answer(case, dtype, torch.float64, index, into)
        torchs, _ = answer(case, dtype, dtype, index, into)
        assert torch.equal(index, wanted.place)
        exact = wanted.x.transpose(0, 1)
        error = off(torchs.x.transpose(0, 1), exact)
        assert off(out.transpose(0, 1), exact) <= max(2 * error, FLOOR[dtype])
        wanted_size = torch.ones_like(size) if wanted.size is None else wanted.size
        assert off(size, wanted_size) <= 2 * FLOOR[dtype]
        wanted_spread = torch.zeros_like(size) if wanted.spread is None else wanted.spread
        scale = wanted.x.var(2, unbiased=False).t()
        assert ((spread - wanted_spread).abs() <= 2 * FLOOR[dtype] * (1 + scale)).all()

    def test_chooses_the_highest_scores(self, case, dtype):
        """By as much as PyTorch's own scores are off in that dtype, and not more than that."""
        _, index, into, _, _ = call(case, dtype)
        _, seen = answer(case, dtype, torch.float64, index, into)
        _, rounded = answer(case, dtype, dtype, index, into)
        kept, pruned = index[:, case.prefix :], complement(index, case.m)
        assert torch.equal(
            index[:, : case.prefix], torch.arange(case.prefix).expand_as(index[:, : case.prefix])
        )
        assert (index.diff(dim=1) > 0).all()
        score = seen.score
        slack = 2 * 2 * (rounded.score - score)[:, case.prefix :].abs().amax(1) + 1e-6
        least, most = score.gather(1, kept), score.gather(1, pruned).amax(1)
        if case.scores == "attention":
            sure, maybe = seen.candidates(case, 4 * (rounded.importance - seen.importance).abs())
            assert maybe.gather(1, pruned).all()
            least = least.masked_fill(~sure.gather(1, kept), torch.inf)
        assert (least.amin(1) >= most - slack).all()
        if case.scores == "predictor":
            assert (into == -1).all()
            return
        assert (into >= case.prefix).all()
        best = torch.stack(
            [seen.cosine[b][pruned[b]][:, kept[b]].amax(1) for b in range(case.batch)]
        )
        slack = 2 * 2 * (rounded.cosine - seen.cosine).abs().max() + 1e-6
        assert (seen.between(pruned, index.gather(1, into)) >= best - slack).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_spread_of_twins_is_none(dtype):
    """And rounding leaves it no less than that."""
    case = Choosing(9, 4, 32, sizes=False)
    x, _, _ = input_of(case, dtype)
    *_, size, spread = call(case, dtype, x=torch.cat([x[:2], x[1:2].expand(7, -1, -1)]))
    assert (size > 1).any(1).all()
    assert ((spread >= 0) & (spread < 1e-5)).all()


@pytest.mark.usefixtures("isa")
def test_predictors_of_any_activation_and_eps():
    def keep(parts: PredictorParts, x: Tensor, n: int) -> Tensor:
        case = Choosing(*x.shape[:1], n, width=x.shape[2], sizes=False)
        return call(case, torch.float32, x=x, chooser=pack_chooser(parts, case.width))[1]

    check_predictors(keep)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scores", ["attention", "predictor"])
def test_threads_and_batch_do_not_matter(scores, dtype):
    """The same bits, and the same choice, whoever computes them."""
    case = Choosing(63, 40, 5, prefix=2, scores=scores)
    x, size, spread = input_of(case, dtype)
    before = torch.get_num_threads()
    try:
        answers = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            answers.append(call(case, dtype))
            alone = [
                call(case, dtype, x=x[:, [b]], size=size[[b]], spread=spread[[b]]) for b in range(5)
            ]
            dims = (1, 0, 0, 0, 0)
            answers.append([torch.cat(part, dim) for part, dim in zip(zip(*alone), dims)])
    finally:
        torch.set_num_threads(before)
    for other in answers[1:]:
        assert all(map(torch.equal, other, answers[0]))
