"""The C++ block that chooses its tokens: equal scores, NaN, strides and refusals."""

import pytest
import torch
from instruction_sets import DTYPES, isa  # noqa: F401
from test_cpu_choice import Choosing, block_of, call, input_of, predictor_of
from torch import Tensor, nn

from slimvit.errors import SlimvitError
from slimvit.ops import (
    AbsorbParts,
    ChooserParts,
    ExtraKey,
    FoldedBlock,
    Threshold,
    pack_block,
    pack_chooser,
)


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
