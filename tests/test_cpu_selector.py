"""A selector in C++, alone, against Selector in float64."""

import copy
import functools
from typing import NamedTuple

import pytest
import torch
from instruction_sets import DTYPES, isa  # noqa: F401
from references import off, randomise
from test_cpu_block import FLOOR
from torch import Tensor

from slimvit.dynamic.selector import Selector
from slimvit.errors import SlimvitError
from slimvit.ops import AbsorbParts, SelectorParts, complement, pack_chooser, why_not_chosen


class Case(NamedTuple):
    """What reaches a selector, and how many patches it keeps."""

    m: int
    patches: int
    batch: int = 3
    prefix: int = 1
    packages: int = 0
    width: int = 48
    heads: int = 3

    def __str__(self) -> str:
        return "_".join(map(str, self))

    @property
    def rest(self) -> slice:
        """The patches among the m tokens."""
        return slice(self.prefix, self.m - self.packages)


CASES = [
    Case(3, 1),
    Case(18, 15, 8, packages=1),
    Case(63, 2, 3, prefix=2, packages=2, width=96),
    Case(64, 63, 2, prefix=0, width=64, heads=1),
    Case(142, 67, 1, packages=2, width=144),
    Case(197, 137, 1, width=192),
    Case(257, 33, 3, prefix=5, packages=1, width=64, heads=4),
    Case(34, 16, 1, width=192, heads=6),
]


@functools.cache
def selector_of(case: Case, dtype: torch.dtype) -> Selector:
    """In float64, of weights that `dtype` holds."""
    return randomise(Selector(case.width, case.heads), case.m).to(dtype).double()


def input_of(case: Case, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(case.m)
    return torch.randn(case.m, case.batch, case.width, generator=generator).to(dtype).float()


def call(case: Case, dtype: torch.dtype, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    parts = SelectorParts(selector_of(case, dtype), case.patches, case.packages)
    pack = pack_chooser(parts, case.width, dtype)
    n = case.prefix + case.patches + case.packages + 1
    x = input_of(case, dtype) if x is None else x
    return torch.ops.slimvit.select_tokens(x, pack, n, case.prefix)


@torch.no_grad()
def answer(
    case: Case, dtype: torch.dtype, compute: torch.dtype, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores and the package in `compute`, where the patches at `index` [B, n] are kept."""
    x = input_of(case, dtype)[case.rest].to(compute)
    logits = copy.deepcopy(selector_of(case, dtype)).to(compute)(x)
    pruned = complement(index, x.shape[0])
    weights = logits.log_softmax(-1)[..., 0].gather(1, pruned).softmax(1).to(compute)
    rows = x.transpose(0, 1).gather(1, pruned.unsqueeze(-1).expand(-1, -1, case.width))
    return (logits[..., 0] - logits[..., 1]).double(), (weights.unsqueeze(1) @ rows).squeeze(1)


@pytest.mark.usefixtures("isa", "poison_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestAlone:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_keeps_the_highest_scores_and_packages_the_others(self, case, dtype):
        out, place = call(case, dtype)
        first, last = case.prefix, case.prefix + case.patches
        kept, others = place[:, first:last], [*range(first), *range(case.m - case.packages, case.m)]
        assert place[:, [*range(first), *range(last, last + case.packages)]].tolist() == (
            [others] * case.batch
        )
        assert (place[:, -1] == case.m).all() and (kept.diff(dim=1) > 0).all()
        rows = place[:, :-1].t().unsqueeze(-1).expand(-1, -1, case.width)
        assert torch.equal(out[:-1], input_of(case, dtype).gather(0, rows))

        index = kept - first
        score, package = answer(case, dtype, torch.float64, index)
        torchs, torchs_package = answer(case, dtype, dtype, index)
        slack = 2 * 2 * (torchs - score).abs().amax(1) + 1e-5
        left = complement(index, score.shape[1])
        assert (score.gather(1, index).amin(1) >= score.gather(1, left).amax(1) - slack).all()
        assert off(out[-1], package) <= max(2 * off(torchs_package, package), FLOOR[dtype])

    def test_of_equal_scores_the_earlier_is_kept(self, dtype):
        case = CASES[1]
        x = input_of(case, dtype)[:1].expand(18, -1, -1)
        out, place = call(case, dtype, x)
        assert place.tolist() == [[*range(16), 17, 18]] * 8
        assert off(out[-1], x[0]) < FLOOR[torch.float32]

    def test_hopeless_patches_have_a_package(self, dtype):
        """Where every patch is kept with a chance that float32 holds for zero."""
        case = CASES[1]
        wanted, _ = call(case, dtype)
        parts = SelectorParts(copy.deepcopy(selector_of(case, dtype)), case.patches, case.packages)
        with torch.no_grad():
            parts.selector.judge3.bias[..., 0] -= 500.0
        pack = pack_chooser(parts, case.width, dtype)
        out, _ = torch.ops.slimvit.select_tokens(input_of(case, dtype), pack, 18, case.prefix)
        assert torch.equal(out[:-1], wanted[:-1])
        assert out.isfinite().all()

    @pytest.mark.parametrize("shift", [-90.0, -1000.0])
    def test_heads_that_all_count_for_next_to_nothing(self, dtype, shift):
        """They count by how they compare, as those do whose weights float32 holds."""
        case = CASES[1]
        parts = SelectorParts(copy.deepcopy(selector_of(case, dtype)), case.patches, case.packages)
        packs = []
        for bias in (-30.0, shift - 30.0):
            with torch.no_grad():
                parts.selector.weigh2.bias += bias
            packs.append(pack_chooser(parts, case.width, dtype))
        (wanted, places), (out, place) = (
            torch.ops.slimvit.select_tokens(input_of(case, dtype), pack, 18, case.prefix)
            for pack in packs
        )
        assert torch.equal(place, places)
        assert off(out, wanted) <= 1e-4  # of biases as rounded

    def test_any_strides(self, dtype):
        case = CASES[2]
        x, wanted = input_of(case, dtype), call(case, dtype)
        for view in (
            x.transpose(0, 1).contiguous().transpose(0, 1),
            x.repeat_interleave(2, 2)[:, :, ::2],
        ):
            assert all(map(torch.equal, call(case, dtype, view), wanted))


def packed(patches: int | None = 11, packages: int = 0) -> Tensor:
    parts = SelectorParts(selector_of(CASES[0], torch.float32), patches, packages)
    return pack_chooser(parts, 48)


def test_opcheck():
    given = (torch.randn(17, 3, 48), packed(), 13, 1)
    torch.library.opcheck(torch.ops.slimvit.select_tokens, given)


def test_no_images():
    out, place = torch.ops.slimvit.select_tokens(torch.empty(17, 0, 48), packed(), 13, 1)
    assert (out.shape, place.shape) == ((13, 0, 48), (0, 13))


def test_refused():
    x, one = torch.randn(17, 3, 48), packed()
    wrong = {
        r"x must be \[m, B, D\], float32": (x.double(), one, 13, 1),
        r"x must be \[m, B, 48\], got \[17, 3, 32\]": (x[:, :, :32], one, 13, 1),
        r"n must be in \[1, m\] = \[1, 17\], got 18": (x, one, 18, 1),
        "n must be what the selector leaves, got 12": (x, one, 12, 1),
        r"prefix must be in \[0, m\] = \[0, 17\], got -1": (x, one, 13, -1),
        r"prefix must be in .*, got -9223372036854775808": (x, one, 13, -(1 << 63)),
        r"prefix must be in .*, got 4294967297": (x, one, 13, (1 << 32) + 1),
        "the 11 that reach it, got 11": (x[:12], one, 12, 1),
        "the 1 that reach it, got 11": (x, packed(packages=15), 13, 1),
        "the pack of the selector is too short": (x, pack_chooser(AbsorbParts(1), 48), 13, 1),
        "a selector alone must keep a fixed number": (x, packed(None), 13, 1),
    }
    for rule, given in wrong.items():
        with pytest.raises(SlimvitError, match=rule):
            torch.ops.slimvit.select_tokens(*given)


def test_odd_channels():
    parts = SelectorParts(Selector(48, 6), 5, 0)
    rule = "channels of its selector's heads must be a multiple of 16, got 8"
    assert f"block 2: the {rule}" in why_not_chosen([None, parts], "cpu")
    rule = "channels of a selector's head must be a positive multiple of 16, got 8"
    with pytest.raises(SlimvitError, match=rule):
        pack_chooser(parts, 48)
