"""The C++ block that chooses its tokens, against dynamic_block in float64."""

import functools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import DTYPES, isa  # noqa: F401
from references import off, randomise
from test_cpu_block import FLOOR, Case, cast, make_parts
from torch import Tensor, nn

from slimvit.errors import SlimvitError
from slimvit.ops import (
    AbsorbParts,
    Alive,
    BlockParts,
    Choice,
    ChooserParts,
    ExtraKey,
    FoldedBlock,
    PredictorParts,
    Threshold,
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

    def __str__(self) -> str:
        shape = f"{self.prefix}_{self.heads}x{self.head_dim}_{self.width}"
        return f"{self.m}to{self.n}_{self.batch}_{shape}_{self.scores}"

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
]
CASES += [CASES[i]._replace(scores="predictor") for i in (0, 1, 3, 5, 6, 8)]


@functools.cache
def predictor_of(width: int) -> PredictorParts:
    hidden = max(16, width // 4 // 16 * 16)
    layers = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, hidden), nn.Linear(hidden, 1)
    norm, down, out = (randomise(layer, seed).double() for seed, layer in enumerate(layers))
    return PredictorParts(norm, down, nn.GELU(), out)


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


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestOrder:
    def case(self) -> Choosing:
        return Choosing(63, 40, 2, prefix=2, scores="predictor", sizes=False)

    def test_of_equal_scores_the_earlier_is_kept(self, dtype):
        x, _, _ = input_of(self.case(), dtype)
        _, index, _, _, _ = call(self.case(), dtype, x=x[:1].expand(63, -1, -1))
        assert torch.equal(index, torch.arange(40).expand(2, -1))

    def test_of_two_scores(self, dtype):
        """All tokens of the higher one, and the earliest of the lower."""
        case = self.case()
        x, _, _ = input_of(case, dtype)
        _, ranked, _, _, _ = call(case, dtype, x=x[:4].repeat_interleave(2, 0), n=3)
        high = ranked[:, 2] // 2  # of tokens 1, 2, 3, as 0 and its twin are the prefix
        for b in range(2):
            low = 1 if high[b] != 1 else 2
            two = x[low].repeat(63, 1, 1)
            places = [7, 8, 30, 62]
            two[places] = x[high[b]]
            _, index, _, _, _ = call(case, dtype, x=two)
            rest = [i for i in range(2, 63) if i not in places][:34]
            assert index[b].tolist() == sorted([0, 1, *places, *rest])

    def test_of_equal_tokens_the_earlier_are_kept(self, dtype):
        """And the others go into the first, as all are equally near."""
        case = self.case()._replace(scores="attention")
        x, _, _ = input_of(case, dtype)
        _, index, into, _, _ = call(case, dtype, x=x[:1].expand(63, -1, -1))
        assert torch.equal(index, torch.arange(40).expand(2, -1))
        assert (into == 2).all()

    @pytest.mark.parametrize("which", [2, 9, 20, 31])
    def test_of_two_alike_the_later_goes_into_the_earlier(self, dtype, which):
        case = self.case()._replace(scores="attention")
        x, _, _ = input_of(case, dtype)
        _, index, _, _, _ = call(case, dtype, x=x, n=42)  # any patch may go
        for b, one in enumerate(index[:, which]):
            x[62 - b, b] = x[one, b]
        _, twins, into, _, _ = call(case, dtype, x=x, n=42)
        for b, one in enumerate(index[:, which].tolist()):
            kept = twins[b].tolist()
            assert one in kept and 62 - b not in kept
            pruned = [i for i in range(63) if i not in kept]
            assert kept[into[b][pruned.index(62 - b)]] == one

    def test_nan_is_the_lowest(self, dtype):
        case = self.case()
        x, _, _ = input_of(case, dtype)
        x[5, 1, 7] = torch.nan
        _, index, _, _, _ = call(case, dtype, x=x, n=62)
        assert 5 not in index[1].tolist()
        _, wanted, _, _, _ = call(case, dtype, n=62)
        assert torch.equal(index[0], wanted[0])

    def test_nothing_but_nan(self, dtype):
        """Whatever is chosen lies among the tokens."""
        case = self.case()._replace(scores="attention")
        out, index, into, _, _ = call(case, dtype, x=torch.full((63, 2, 64), torch.nan))
        assert torch.equal(index, torch.arange(40).expand(2, -1))
        assert ((into >= 2) & (into < 40)).all()
        assert out.isnan().all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype):
    case = Choosing(63, 40)
    x, size, spread = input_of(case, dtype)
    wanted = call(case, dtype)
    images_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    columns = x.repeat_interleave(2, 2)[:, :, ::2]
    for view in (images_first, columns):
        assert all(map(torch.equal, call(case, dtype, x=view), wanted))
    for name, of in (("size", size), ("spread", spread)):
        assert all(map(torch.equal, call(case, dtype, **{name: of.t().contiguous().t()}), wanted))


def test_no_images():
    case = Choosing(63, 40, sizes=False)
    out, index, into, size, spread = call(case, torch.float32, x=torch.empty(63, 0, 64))
    assert (out.shape, index.shape) == ((40, 0, 64), (0, 40))
    assert (into.shape, size.shape, spread.shape) == ((0, 23), (0, 40), (0, 40))


class TestRefused:
    def refuses(self, message: str, **changes: object) -> None:
        with pytest.raises(SlimvitError, match=message):
            call(Choosing(63, 40, prefix=2), torch.float32, **changes)

    @pytest.mark.parametrize("n", [0, 2, 63, 64, -1])
    def test_n(self, n):
        self.refuses(rf"n must be in \[prefix \+ 1, m - 1\] = \[3, 62\], got {n}", n=n)

    def test_x_size_and_spread(self):
        self.refuses(r"x must be \[m, B, D\], float32, .*float64", x=torch.ones(63, 3, 64).double())
        self.refuses(r"x must be \[m, B, 64\], got \[63, 3, 48\]", x=torch.ones(63, 3, 48))
        for name in ("size", "spread"):
            self.refuses(rf"{name} must be \[B, m\] = \[3, 63\]", **{name: torch.ones(63)})

    def test_chooser(self):
        def pack(
            parts: ChooserParts, width: int = 64, dtype: torch.dtype = torch.float32
        ) -> Tensor:
            return pack_chooser(parts, width, dtype)

        message = "all packs must be of one model, instruction set and dtype"
        self.refuses(message, chooser=pack(AbsorbParts(1), dtype=torch.bfloat16))
        self.refuses(message, chooser=pack(AbsorbParts(1), width=48))
        self.refuses(
            "the 3 tokens that the head reads must be among the prefix, got prefix 2",
            chooser=pack(AbsorbParts(3)),
        )
        block = pack_block(FoldedBlock(block_of(Choosing(63, 40), torch.float32)))
        self.refuses("the pack of the chooser is something else", chooser=block)
        self.refuses("the pack of the block is something else", pack=pack(predictor_of(64)))
        self.refuses("the pack of the chooser is too short", chooser=block[:0])

    def test_a_number_of_each_images_own(self):
        ragged = pack_chooser(AbsorbParts(1, Threshold(0.1, 63, 40)), 64)
        self.refuses("a block alone must keep a fixed number of tokens", chooser=ragged)

    def test_an_extra_key(self):
        parts = block_of(Choosing(63, 40), torch.float32)
        extra = ExtraKey(torch.ones(1, 2, 1, 32), torch.ones(1, 2, 1, 32), 1.0)
        pack = pack_block(FoldedBlock(parts), extra)
        self.refuses("a block that chooses its tokens has no extra key", pack=pack)

    def test_odd_channels(self):
        parts = predictor_of(64)._replace(down=nn.Linear(64, 24), out=nn.Linear(24, 1))
        with pytest.raises(SlimvitError, match="hidden must be a positive multiple of 16, got 24"):
            pack_chooser(parts, 64)
