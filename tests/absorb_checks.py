"""Cases and references of what absorbs what, for the kernels of every back end."""

import math
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from kernel_checks import (
    DEVICE,
    EPS,
    FLOOR,
    Random,
    check_stats,
    distance,
    kernels,
    stats_of,
)
from torch import Tensor

from slimvit.ops import Alive, Choice, absorb_tokens


class Case(NamedTuple):
    """`tokens` are those that the head reads; tiles of cosines are `tile` by `tile`.

    `candidates` may be pruned; None for all patches.
    """

    m: int
    width: int
    heads: int
    d: int
    batch: int = 1
    tokens: int = 1
    prefix: int = 1
    sized: bool = False
    sharpness: float = 1.0
    tile: int = 64
    candidates: int | None = None

    @property
    def some(self) -> int:
        return self.m - self.prefix if self.candidates is None else self.candidates

    def __str__(self) -> str:
        given = ((k, v) for k, v in self._asdict().items() if v != self._field_defaults.get(k))
        return ",".join(f"{k}={v}" for k, v in given)


SCORED = [
    Case(2, 64, 2, 32, 3),
    Case(5, 48, 3, 16, 3, 2, 2, True, tile=0),
    Case(17, 112, 2, 56, 1, 1, 5, tile=16),
    Case(63, 64, 1, 64, 3, 1, 1, True),
    Case(63, 192, 6, 32, 1, 2, 5, sharpness=30.0, candidates=1),
    Case(197, 192, 3, 64, 1, 1, 2, True, candidates=33),
    Case(257, 384, 6, 64),
    Case(577, 64, 2, 32, 1, 2, 2, True),
]


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, q, kv, the norm's weight and bias, and sizes or None."""
    random, inner = Random(case.m), case.heads * case.d
    x = random(case.batch, case.m, case.width, dtype=dtype) + 0.5
    x[:, 1::3] = x[:, : case.m - 1 : 3] + 0.25 * x[:, 1::3]  # some tokens are much alike
    q = random(case.batch, case.tokens, inner, dtype=dtype) * case.sharpness
    kv = random(case.batch, case.m, 2 * inner, dtype=dtype)
    size = 1 + (3 * random(case.batch, case.m).abs()).round() if case.sized else None
    return x, q, kv, 1 + 0.3 * random(case.width), 0.3 * random(case.width), size


def without_variance(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Such inputs where the norm makes zeros of four tokens."""
    x, q, kv, weight, bias, size = inputs(case, dtype)
    x[:, 5:9] = 1
    return x, q, kv, weight, 0 * bias, size


def formulas(case: Case, x, q, kv, weight, bias, size) -> tuple[Tensor, Tensor]:
    """Importances, and all cosines, in float32 or wider after the norm."""
    wide = torch.promote_types(x.dtype, torch.float32)
    heads = (case.heads, case.d)
    q, k, v = (
        t.to(wide).unflatten(2, heads).transpose(1, 2) for t in (q, *kv.chunk(2, -1))
    )  # [B, H, ·, d]
    logits = q @ k.mT * case.d**-0.5
    if size is not None:
        logits = logits + size.to(wide).log()[:, None, None]
    importance = (logits.softmax(-1).mean(2) * v.norm(dim=-1)).sum(1)
    y = F.normalize(F.layer_norm(x, x.shape[-1:], weight, bias, EPS).to(wide), dim=-1)
    return importance, y @ y.mT


def check_scored(case: Case, given: tuple[Tensor, ...], got: tuple[Tensor, ...]) -> None:
    """Importances, scores and cosines against the formulas; who is ahead, by what was found."""
    importance, score, cosine = got
    kinds = (torch.float64, given[0].dtype)
    (exact, alike), own = ([*formulas(case, *(t if t is None else t.to(kind) for t in given))]
                           for kind in kinds)  # fmt: skip

    def near(got: Tensor, exact: Tensor, own: Tensor, where: Tensor | bool = True) -> bool:
        got, exact, own = (torch.where(torch.as_tensor(where, device=got.device), t, 0.0)
                           for t in (got, exact, own))  # fmt: skip
        return distance(got, exact) <= max(2 * distance(own, exact), FLOOR[given[0].dtype])

    assert {t.dtype for t in got} == {torch.float32}
    assert near(importance, exact, own[0])
    position = torch.arange(case.m, device=score.device)
    theirs, mine = importance[:, None, :], importance[:, :, None]
    ahead = (theirs > mine) | ((theirs == mine) & (position < position[:, None]))
    ahead &= position >= case.prefix
    assert (cosine[~ahead] == -1).all() and near(cosine, alike, own[1], ahead)
    candidate = ahead.sum(2) >= case.m - case.prefix - case.some
    assert candidate[:, case.prefix :].sum(1).eq(case.some).all()
    assert (score[~candidate] == math.inf).all()
    found = [i.sqrt() * (1 - c.masked_fill(~ahead, -1).amax(2)) for i, c in ((exact, alike), own)]
    assert near(score, *found, candidate)


MERGED = [
    (1, 2, 1, 64, 0),
    (3, 5, 3, 48, 1),
    (3, 63, 40, 64, 2),
    (1, 63, 2, 192, 1),
    (1, 197, 150, 192, 1),
    (1, 257, 200, 384, 5),
    (1, 577, 90, 64, 2),
]


class Several(NamedTuple):
    """What tokens stand for: their sizes and spreads, [B, m] each; None where for themselves."""

    size: Tensor | None = None
    spread: Tensor | None = None


def merging(batch: int, m: int, n: int, width: int, prefix: int, dtype: torch.dtype) -> tuple:
    """x, importances, which are kept, and where the others go, nowhere twice in three."""
    random = Random(m)
    index = random.index(batch, n - prefix, m - prefix).sort(1).values + prefix
    first = torch.arange(prefix, device=DEVICE).expand(batch, -1)
    index = torch.cat([first, index], 1)
    into = random.index(batch, m, 3 * m) % n // 3 * 3
    into = into.clamp(min=prefix).scatter(1, index, torch.arange(n, device=DEVICE).expand(batch, n))
    importance = random(batch, m).abs()
    importance[:, ::4] = 0
    x = random(batch, m, width, dtype=dtype)
    x[:, 1::2] = (x[:, 1::2] + 4).to(dtype)  # their means count for nothing in the variances
    return x, importance, index, into.int()


def several(batch: int, m: int) -> Several:
    """Every third token stands for itself alone."""
    random = Random(m + 1)
    size, spread = 1 + (3 * random(batch, m).abs()).round(), random(batch, m).square()
    size[:, ::3], spread[:, ::3] = 1, 0
    return Several(size, spread)


def given(case: tuple, dtype: torch.dtype, again: bool) -> tuple:
    """What `merge` and the reference take; `again`: tokens stand for several already."""
    return *merging(*case, dtype), several(*case[:2]) if again else Several()


def merge(
    x: Tensor,
    importance: Tensor,
    index: Tensor,
    into: Tensor,
    of: Several,
    kernels: ModuleType = kernels,
) -> tuple[Tensor, ...]:
    stats = stats_of(x, of.spread)
    return kernels.absorb_merge(x, stats, importance, index, into, **of._asdict())


def merged(x: Tensor, importance: Tensor, index: Tensor, into: Tensor, of: Several) -> Alive:
    """The reference's answer."""
    batch, m, _ = x.shape
    away = torch.ones(batch, m, dtype=torch.bool, device=x.device).scatter(1, index, False)
    place = torch.arange(m, device=x.device).expand(batch, -1)
    choice = Choice(index, into.long()[away].view(batch, -1), importance.clamp(min=1e-20))
    return absorb_tokens(Alive(x.transpose(0, 1), place, of.size, spread=of.spread), choice)


def check_twins(kernels: ModuleType, batch: int, dtype: torch.dtype) -> None:
    """The spread of tokens that are all alike is none, and rounding leaves it no less than that."""
    x = Random()(batch, 1, 64, dtype=dtype).expand(-1, 4, -1).contiguous()
    index = torch.tensor([[0, 1]], device=DEVICE).repeat(batch, 1)
    into = torch.tensor([[0, 1, 1, 1]], device=DEVICE).int().repeat(batch, 1)
    importance = Random(1)(batch, 4).abs()
    *_, spread = merge(x, importance, index, into, Several(), kernels=kernels)
    assert ((spread >= 0) & (spread < 1e-6)).all()


def alone(index: Tensor, into: Tensor) -> Tensor:
    """Which of the kept nothing goes into."""
    ones = torch.ones(into.shape, device=into.device)
    return torch.zeros(index.shape, device=into.device).scatter_add(1, into.long(), ones) == 1


def check_merged(kernels: ModuleType, x: Tensor, *rest: Tensor | Several) -> None:
    """A back end's `absorb_merge` against the reference; `rest` as for `merge`."""
    out, stats, size, bias, spread = merge(x, *rest, kernels=kernels)
    dtype = x.dtype
    wanted, own = (merged(x.to(kind), *rest) for kind in (torch.float64, dtype))
    exact = wanted.x.transpose(0, 1)
    assert out.dtype == dtype
    assert distance(out, exact) <= max(2 * distance(own.x.transpose(0, 1), exact), FLOOR[dtype])
    check_stats(stats, out, spread)
    torch.testing.assert_close(size, wanted.size, rtol=1e-6, atol=0)
    torch.testing.assert_close(bias, size.log(), rtol=1e-6, atol=1e-7)
    assert spread.dtype == torch.float32
    # It is what is left of a variance, which is that of a row as rounded.
    moment = wanted.spread + exact.float().var(-1, correction=0)
    assert ((spread - wanted.spread).abs() <= 4 * torch.finfo(dtype).eps * moment).all()
