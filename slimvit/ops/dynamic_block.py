"""One block that chooses for each image which tokens it keeps, in plain PyTorch: the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from slimvit.errors import PlanError
from slimvit.ops.slim_block import BlockParts, attend, mlp_branch, project_kv, project_q, take
from slimvit.ops.spread import spread_norm, variance


class Alive(NamedTuple):
    """The tokens that a block receives, of each image its own, prefix tokens first.

    Attributes:
        x: [m, B, D].
        place: where each stands in the full sequence of N tokens, [B, m], int64; N and more for
            package tokens, which stand nowhere.
        size: how many tokens each stands for, float32 [B, m]; None where every one stands for
            itself alone. Keys carry log(size) as a bias, as if all of them were still there.
        policy: in training, 0 for tokens that are pruned but still rows, else 1: float32 [B, m],
            with a gradient; no query sees the pruned ones. None where all rows are alive.
        spread: mean squared deviation, per channel, of the tokens that each stands for from their
            average, float32 [B, m]; None where every one stands for itself alone.
    """

    x: Tensor
    place: Tensor
    size: Tensor | None = None
    policy: Tensor | None = None
    spread: Tensor | None = None


class Choice(NamedTuple):
    """Which of the m alive tokens a block keeps.

    Attributes:
        index: their positions among the alive, ascending, [B, n], int64.
        into: for each pruned token, in ascending order, which of the n kept ones it is averaged
            into, [B, m - n], int64; None drops the pruned tokens.
        weight: of each alive token in such an average, [B, m], positive; None for its size.
    """

    index: Tensor
    into: Tensor | None = None
    weight: Tensor | None = None


class View:
    """What a planner may look at when it chooses: block l between its keys and its queries.

    Attributes:
        alive: the tokens that the block receives.
        y: LN1 of them, [m, B, D].
        keys, values: of all of them, [B, H, m, d].
        prefix: prefix tokens among them, the first ones, which are always kept.
    """

    def __init__(
        self, alive: Alive, block: BlockParts, y: Tensor, prefix: int, head_tokens: int
    ) -> None:
        self.alive, self.prefix = alive, prefix
        self.keys, self.values = project_kv(block, y)
        self.y, self._block, self._head_tokens = y, block, head_tokens

    @property
    def size(self) -> Tensor:
        """How many tokens each alive one stands for, float32 [B, m]."""
        if self.alive.size is None:
            return torch.ones_like(self.alive.place, dtype=torch.float32)
        return self.alive.size

    def class_attention(self) -> Tensor:
        """Attention of the tokens that the head reads, averaged over them: float32 [B, H, m]."""
        q = project_q(self._block, self.y[: self._head_tokens]).float()
        return self._attention(q, self.keys.float()).mean(2)

    def attention(self) -> Tensor:
        """Attention of all alive tokens, [B, H, m, m]; costs as much as attention itself."""
        return self._attention(project_q(self._block, self.y), self.keys)

    def _attention(self, q: Tensor, keys: Tensor) -> Tensor:
        logits = q @ keys.transpose(-2, -1) * q.shape[-1] ** -0.5
        if self.alive.size is not None:
            logits = logits + self.alive.size.log().to(q.dtype)[:, None, None, :]
        if self.alive.policy is not None:
            logits = logits.masked_fill(self.alive.policy[:, None, None, :] == 0, -torch.inf)
        return logits.softmax(-1)

    def top(self, scores: Tensor, n: int | None) -> Choice:
        """The prefix tokens and the highest scores [B, m]: n in all; among equals the earlier.

        NaN counts as the lowest, as it does where an image itself is NaN.

        Raises:
            PlanError: the scores are of another shape, or the plan's `count` gave no number.
        """
        if n is None:
            raise PlanError("top needs the number of tokens to keep, but `count` gave None")
        shape = self.alive.place.shape
        if not isinstance(scores, Tensor) or scores.shape != shape:
            raise PlanError(f"scores must be [B, m] = {list(shape)}, got {_found(scores)}")
        return Choice(top(scores, n, self.prefix))


def top(scores: Tensor, n: int, prefix: int) -> Tensor:
    """Positions [B, n], ascending, of the first `prefix` and of the highest of the other scores.

    Among equal scores the earlier token is kept; NaN counts as the lowest. Scores are compared in
    float32.
    """
    position = torch.arange(scores.shape[1], device=scores.device)
    scores = scores.detach().float()
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    scores = torch.where(position < prefix, torch.inf, scores)
    # Ranks are counted as the kernels do: ONNX has no stable sort.
    mine, theirs = scores.unsqueeze(2), scores.unsqueeze(1)  # [B, m, 1], [B, 1, m]
    ahead = (theirs > mine) | ((theirs == mine) & (position < position.unsqueeze(1)))
    return _ascending(ahead.sum(2) < n, n)


def complement(index: Tensor, m: int) -> Tensor:
    """Positions in [0, m) that are not in `index` [B, n], ascending: [B, m - n]."""
    chosen = torch.zeros(index.shape[0], m, dtype=torch.int64, device=index.device)
    return _ascending(chosen.scatter(1, index, 1) == 0, m - index.shape[1])


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, i]], [B, n, ·], of x [B, m, ·] and index [B, n]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def _ascending(mask: Tensor, n: int) -> Tensor:
    """Positions [B, n] at which `mask` [B, m] is true, n in each row: of any batch at once."""
    m = mask.shape[1]
    # Whole numbers, since runtimes that compute in bfloat16 would mix up larger ones.
    key = torch.where(mask, m - torch.arange(m, device=mask.device), 0)
    return key.topk(n, dim=1).indices


def absorb_tokens(alive: Alive, choice: Choice) -> Alive:
    """The kept tokens, each averaged with the pruned ones that go into it.

        x_k = Σ w_i x_i / Σ w_i over i = k and the pruned i with into_i = k,  size_k = Σ size_i
        spread_k = Σ w_i (spread_i + var(x_i)) / Σ w_i − var(x_k)

    var is over the channels. A token that nothing goes into stays as it is. No scatter: a small
    product, the same on every device in every run.

    Raises:
        PlanError: tokens with a policy are absorbed: there is no average of what may be pruned.
    """
    x, place = take(alive.x, choice.index), alive.place.gather(1, choice.index)
    if choice.into is None:
        others = (None if of is None else of.gather(1, choice.index) for of in alive[2:])
        return Alive(x, place, *others)
    if alive.policy is not None:
        raise PlanError("choose must give into = None where the tokens have a policy, got places")
    wide = torch.promote_types(x.dtype, torch.float32)
    sizes = torch.ones_like(alive.place, dtype=torch.float32) if alive.size is None else alive.size
    weight = (sizes if choice.weight is None else choice.weight).to(wide)
    pruned = complement(choice.index, alive.x.shape[0])
    kept = torch.arange(choice.index.shape[1], device=place.device)
    belongs = choice.into.unsqueeze(1) == kept[:, None]  # [B, n, m - n]
    size = sizes.gather(1, choice.index) + (belongs * sizes.gather(1, pruned).unsqueeze(1)).sum(2)
    own, theirs = weight.gather(1, choice.index), belongs * weight.gather(1, pruned).unsqueeze(1)
    total = own + theirs.sum(2)  # [B, n]
    grows = belongs.any(2)

    added = torch.einsum("bnp,pbd->nbd", theirs, take(alive.x, pruned).to(wide))
    mean = (x.to(wide) * own.t().unsqueeze(-1) + added) / total.t().unsqueeze(-1)
    mean = torch.where(grows.t().unsqueeze(-1), mean.to(x.dtype), x)

    before = torch.zeros_like(sizes) if alive.spread is None else alive.spread
    moment = before + variance(alive.x)  # [B, m]
    added = (theirs @ moment.gather(1, pruned).unsqueeze(-1)).squeeze(-1)
    moment = (own * moment.gather(1, choice.index) + added) / total
    spread = (moment - variance(mean)).clamp(min=0).float()
    spread = torch.where(grows, spread, before.gather(1, choice.index))
    return Alive(mean, place, size, spread=spread)


def dynamic_block(
    alive: Alive,
    block: BlockParts,
    n: int | None,
    choose: Callable[[View, int | None], Choice],
    *,
    prefix: int,
    head_tokens: int = 1,
    check_places: bool = False,
) -> Alive:
    """A block that keeps n of its tokens, each image its own.

        y = LN1(x);  K, V of all of y;  index, into = choose(…)
        z = x[index], averaged with what is absorbed
        x' = z + ls1 · Attn(LN1(z), K, V);  out = x' + ls2 · MLP(LN2(x'))

    Norms and MLP know of the spread of tokens that stand for several: `slimvit.ops.spread`.

    Args:
        alive: the tokens, m of them, with place, size and spread.
        block: the block's modules.
        n: tokens to keep; None for as many as are chosen. Where n ≤ `prefix` or n = m there is
            nothing to choose: the first n.
        choose: asked with a view of the block and n.
        prefix: prefix tokens, always kept.
        head_tokens: leading tokens that the head reads.
        check_places: look at what is chosen, not at its shape alone; not while torch traces, where
            there are no values.

    Returns:
        The kept tokens, with their places, sizes and spreads. Without anything absorbed this is
        `slim_block(x, block, index, key_bias=log(size))`.

    Raises:
        PlanError: n is more than the alive tokens, or the choice is none of n tokens; tokens with
            a policy are absorbed; where places are checked, they are not ascending with the prefix
            tokens first.
    """
    m = alive.x.shape[0]
    if n is not None and n > m:
        raise PlanError(f"n must be at most m = {m}, the alive tokens, got {n}")
    y = spread_norm(block.norm1, alive.x, alive.spread)
    view = View(alive, block, y, prefix, head_tokens)
    if n is not None and (n <= prefix or n == m):
        others = (None if of is None else of[:, :n] for of in alive[1:])
        kept = Alive(take(alive.x, n), *others)
        y_kept = take(y, n)
    else:
        choice = choose(view, n)
        _check(choice, alive.x.shape[1], n, m)
        n = choice.index.shape[1] if n is None else n
        if check_places:
            _check_places(choice, m, prefix)
        kept = absorb_tokens(alive, choice)
        if choice.into is None:
            y_kept = take(y, choice.index)
        else:
            y_kept = spread_norm(block.norm1, kept.x, kept.spread)
    q = project_q(block, y_kept)
    key_bias = None if alive.size is None else alive.size.log().to(alive.x.dtype)
    x = attend(kept.x, y_kept, block, q, view.keys, view.values, key_bias, alive.policy)
    return kept._replace(x=mlp_branch(x, block, kept.spread))


def _check_places(choice: Choice, m: int, prefix: int) -> None:
    """The blocks above would take whatever comes first for the prefix tokens."""
    index = choice.index
    if torch.compiler.is_compiling() or index.is_meta or isinstance(index, FakeTensor):
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(index) or get_proxy_mode() is not None:
        return
    if index.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    found = f"got {index[0].tolist()} of {m} for the first image" if len(index) else ""
    first = torch.arange(prefix, device=index.device)
    if index.shape[1] < prefix or (index[:, :prefix] != first).any():
        raise PlanError(f"choose must keep the {prefix} prefix tokens, {found}")
    bounds = ((index < 0) | (index >= m)).any()
    if bounds or (index[:, 1:] <= index[:, :-1]).any():
        raise PlanError(
            f"choose must give places from 0 to m - 1 = {m - 1}, each once and ascending, {found}"
        )
    if choice.into is not None and ((choice.into < 0) | (choice.into >= index.shape[1])).any():
        raise PlanError(
            f"choose must give into, of each pruned token, from 0 to n - 1 = {index.shape[1] - 1}"
        )
    if choice.weight is not None and (choice.weight <= 0).any():
        least = choice.weight.min().item()
        raise PlanError(f"choose must give weights above 0, got {least:g}")


def _check(choice: Choice, batch: int, n: int | None, m: int) -> None:
    """Refuse what is no choice, or one of another dtype or shape."""
    if not isinstance(choice, Choice):
        raise PlanError(f"choose must give a Choice, got {_found(choice)}")
    index, into, weight = choice
    for name, places in (("index", index), ("into", into)):
        optional = name == "into" and places is None
        if not optional and not (isinstance(places, Tensor) and places.dtype == torch.int64):
            raise PlanError(f"choose must give {name} in int64, got {_found(places)}")
    n = index.shape[-1:].numel() if n is None else n
    for name, of, shape in (
        ("index [B, n]", index, (batch, n)),
        ("into [B, m - n]", into, (batch, m - n)),
        ("weight [B, m]", weight, (batch, m)),
    ):
        if of is not None and (not isinstance(of, Tensor) or of.shape != shape):
            raise PlanError(f"choose must give {name} = {list(shape)}, got {_found(of)}")


def _found(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
