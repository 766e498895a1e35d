"""The kept sets S_1 … S_L of a vision transformer, as booleans, with their provenance."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimvit.checks import number, one_of, whole, wholes
from slimvit.errors import MasksError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEMANTICS = ("drop", "zero", "idle")


@dataclass(frozen=True, eq=False)
class Masks:
    """Kept sets of the L blocks: `keep[l - 1, i]` is true where block l computes token i.

    Nested, S_L ⊆ … ⊆ S_1, and every prefix token (class, distillation, register) that the last
    block keeps is kept by all; tokens are in the model's order, prefix tokens first.

    Attributes:
        keep: bool [L, N] on the CPU; N counts all tokens, prefix included.
        prefix: number of prefix tokens; blocks 1 … L-1 keep them all.
        grid: patches down and across; grid[0] * grid[1] + prefix == N.
        semantics: what a pruned token is to later blocks: "drop" (gone), "zero" (a zero row;
            Patch Slimming, footnote 1) or "idle" (stays as it was; Patch Slimming, Eq. 2).
        model: timm name of the model that the masks belong to, or "" if unknown.
        image_size: height and width in pixels, or None if unknown.
        tolerance: the error tolerance of the search, or None.
        scores: float32 [L, N], finite, the score of each token at each block, or None.
        errors: float32 [L], finite, the relative error that each block reached, or None.
        data: fingerprint of the calibration images, or "".

    Raises:
        MasksError: a shape, a dtype, the nesting or a prefix token is wrong.

    Source: Patch Slimming (Tang et al., CVPR 2022), section 3.
    """

    keep: Tensor
    prefix: int
    grid: tuple[int, int]
    semantics: str = "drop"
    model: str = ""
    image_size: tuple[int, int] | None = None
    tolerance: float | None = None
    scores: Tensor | None = None
    errors: Tensor | None = None
    data: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix", whole("prefix", self.prefix, 0, MasksError))
        object.__setattr__(self, "grid", _pair("grid", self.grid))
        if self.image_size is not None:
            object.__setattr__(self, "image_size", _pair("image_size", self.image_size))
        _check(self)
        # The caller's own may change later, and what was checked would not hold.
        keep = self.keep.detach().clone(memory_format=torch.contiguous_format)
        object.__setattr__(self, "keep", keep)
        for name, shape in (("scores", keep.shape), ("errors", keep.shape[:1])):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, _float32(name, given, tuple(shape)))

    def __eq__(self, other: object) -> bool:
        """Whether all attributes are equal, those that are tensors bit for bit."""
        if not isinstance(other, Masks):
            return NotImplemented
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return all(
            torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
            for a, b in pairs
        )

    def __hash__(self) -> int:
        return hash((self.counts, self.prefix, self.grid, self.semantics, self.model, self.data))

    def __repr__(self) -> str:
        name = f"{self.model}, " if self.model else ""
        return f"Masks({name}{self.semantics}, kept {','.join(map(str, self.counts))})"

    @property
    def depth(self) -> int:
        """L, the number of blocks."""
        return self.keep.shape[0]

    @property
    def tokens(self) -> int:
        """N, all tokens, prefix included."""
        return self.keep.shape[1]

    @property
    def counts(self) -> tuple[int, ...]:
        """n_1 … n_L: the tokens that each block computes."""
        return tuple(self.keep.sum(1).tolist())

    @property
    def alive(self) -> tuple[int, ...]:
        """n_0 … n_{L-1}: the tokens that each block receives (n_0 = N)."""
        return (self.tokens, *self.counts[:-1])

    @property
    def order(self) -> Tensor:
        """Lifetime order, int64 [N]: tokens by how deep they are kept, longest first.

        Ties keep the model's order, so prefix tokens stand first. With x[:, order], the kept set
        of every block is a prefix.
        """
        return torch.argsort(self.keep.sum(0), descending=True, stable=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; it appears whole or not at all.

        Raises:
            OSError: the folder is missing or not writable, or the disk is full.
        """
        from slimvit.masks._file import save

        save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Masks:
        """Read and validate a masks file.

        Raises:
            MasksError: the file is missing, truncated, not a masks file, or its masks are wrong.
        """
        from slimvit.masks._file import load

        return load(path)

    def places(self, images: Tensor) -> list[Tensor]:
        """Places of the tokens that each block keeps of images [B, …]: L of [B, n], int64."""
        rows = [row.nonzero()[:, 0].to(images.device) for row in self.keep]
        return [row.expand(images.shape[0], -1) for row in rows]

    def plot(self, image: object = None) -> Figure:
        """Draw the kept patches block by block over an image (array [H, W, 3], PIL or tensor)."""
        from slimvit.masks._plot import plot_layers

        return plot_layers(self, image)

    def plot_pyramid(self) -> Figure:
        """Draw the kept counts of the blocks (Patch Slimming, Figure 5)."""
        from slimvit.masks._plot import plot_pyramid

        return plot_pyramid(self)

    def replace(self, **changes: object) -> Masks:
        """A copy with other attributes, validated again."""
        return replace(self, **changes)  # type: ignore[arg-type]

    @staticmethod
    def dense(depth: int, grid: tuple[int, int], prefix: int = 1, **info: object) -> Masks:
        """Masks that keep every token in every block."""
        depth, grid = whole("depth", depth, 1, MasksError), _pair("grid", grid)
        prefix = whole("prefix", prefix, 0, MasksError)
        keep = torch.ones(depth, grid[0] * grid[1] + prefix, dtype=torch.bool, device="cpu")
        return Masks(keep, prefix, grid, **info)  # type: ignore[arg-type]

    @staticmethod
    def from_counts(
        counts: Sequence[int],
        grid: tuple[int, int],
        prefix: int = 1,
        *,
        scores: Any = None,
        **info: object,
    ) -> Masks:
        """Masks with given kept counts n_1 … n_L, prefix tokens included.

        Args:
            counts: non-increasing, each between 1 and N.
            grid: patches down and across.
            prefix: number of prefix tokens; they are kept before any patch.
            scores: [N], a tensor or an array, higher is kept longer; without it the patches kept at
                any count are spread evenly over the image.
            info: other attributes of Masks.

        Raises:
            MasksError: something is of another kind or shape, or out of bounds.
        """
        grid, prefix = _pair("grid", grid), whole("prefix", prefix, 0, MasksError)
        tokens = grid[0] * grid[1] + prefix
        counts = wholes("counts", counts, error=MasksError)
        if not counts or any(not 1 <= n <= tokens for n in counts):
            raise MasksError(f"kept counts must lie in [1, N] = [1, {tokens}], got {list(counts)}")
        if any(b > a for a, b in zip(counts, counts[1:], strict=False)):
            raise MasksError(f"kept counts must not grow with depth, got {list(counts)}")
        if scores is None:
            ranking = torch.cat([torch.arange(prefix, device="cpu"), prefix + even_spread(grid)])
        else:
            first = _scores(scores, tokens)
            first[:prefix] = torch.inf
            ranking = torch.argsort(first, descending=True, stable=True)
        keep = torch.zeros(len(counts), tokens, dtype=torch.bool, device="cpu")
        for layer, n in enumerate(counts):
            keep[layer, ranking[:n]] = True
        return Masks(keep, prefix, grid, **info)  # type: ignore[arg-type]

    @staticmethod
    def uniform(
        depth: int,
        keep_ratio: float,
        grid: tuple[int, int],
        prefix: int = 1,
        *,
        head_tokens: int = 1,
        scores: Any = None,
        **info: object,
    ) -> Masks:
        """The same patches kept in every block but the last, which keeps what the head reads.

        Args:
            depth: L.
            keep_ratio: kept patches over all patches, in [0, 1].
            grid: patches down and across.
            prefix: number of prefix tokens.
            head_tokens: leading tokens that the head reads: all that the last block computes.
            scores: [N], as in `from_counts`.
            info: other attributes of Masks.

        Source: the uniform baseline of Patch Slimming, Table 3.
        """
        depth = whole("depth", depth, 1, MasksError)
        grid, prefix = _pair("grid", grid), whole("prefix", prefix, 0, MasksError)
        keep_ratio = number("keep_ratio", keep_ratio, least=0, most=1, error=MasksError)
        head_tokens = whole("head_tokens", head_tokens, 1, MasksError)
        kept = prefix + round(keep_ratio * grid[0] * grid[1])
        counts = [kept] * (depth - 1) + [min(head_tokens, kept)]
        return Masks.from_counts(counts, grid, prefix, scores=scores, **info)


def even_spread(grid: tuple[int, int]) -> Tensor:
    """Patches ranked so that any first k of them are spread evenly: int64 [grid area].

    The R2 low-discrepancy sequence visits the cells; each patch stands where it is first visited.
    """
    height, width = grid
    wanted = height * width
    ranking: dict[int, None] = {}
    step = 0
    plastic = 1.32471795724474602596
    while len(ranking) < wanted:
        row = int((0.5 + step / plastic) % 1 * height)
        column = int((0.5 + step / plastic**2) % 1 * width)
        ranking[row * width + column] = None
        step += 1
    return torch.tensor(list(ranking), device="cpu")


def _pair(name: str, value: Sequence[int]) -> tuple[int, int]:
    try:
        height, width = (operator.index(side) for side in value)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise MasksError(f"{name} must be two positive whole numbers, got {value}")
    return height, width


def _scores(given: Any, tokens: int) -> Tensor:
    """A copy of a tensor's or an array's scores, float64 [N] on the CPU."""
    try:
        scores = torch.as_tensor(given).detach().to("cpu", torch.float64, copy=True)
    except (TypeError, ValueError, RuntimeError):
        raise MasksError(f"scores must be numbers, got {type(given).__name__}") from None
    if tuple(scores.shape) != (tokens,):
        raise MasksError(f"scores must be [N] = [{tokens}], got {list(scores.shape)}")
    if scores.isnan().any():
        raise MasksError(f"scores must be numbers, {int(scores.isnan().sum())} are NaN")
    return scores


def _float32(name: str, given: Any, shape: tuple[int, ...]) -> Tensor:
    """A copy of a tensor of finite real numbers, float32 on the CPU."""
    if not isinstance(given, Tensor):
        raise MasksError(f"{name} must be a tensor {list(shape)}, got {type(given).__name__}")
    if tuple(given.shape) != shape:
        raise MasksError(f"{name} must be {list(shape)}, got {list(given.shape)}")
    if given.dtype == torch.bool or given.is_complex() or given.is_meta:
        raise MasksError(f"{name} must be real numbers, got {given.dtype} on {given.device}")
    form = torch.contiguous_format
    own = given.detach().to("cpu", torch.float32, copy=True, memory_format=form)
    if not own.isfinite().all():
        raise MasksError(f"{name} must be finite, got NaN or infinity")
    return own


def _check(masks: Masks) -> None:
    keep, prefix, grid = masks.keep, masks.prefix, masks.grid
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.dim() != 2:
        kind = type(keep).__name__
        got = f"{keep.dtype} {list(keep.shape)}" if isinstance(keep, Tensor) else kind
        raise MasksError(f"keep must be [L, N] booleans, got {got}")
    if keep.device.type != "cpu":
        raise MasksError(f"keep must be on the CPU, got {keep.device}")
    one_of("semantics", masks.semantics, SEMANTICS, MasksError)
    if grid[0] * grid[1] + prefix != keep.shape[1]:
        raise MasksError(
            f"tokens must be grid {grid} plus {prefix} prefix tokens, got N = {keep.shape[1]}"
        )
    if keep.shape[0] == 0 or not keep[-1].any():
        raise MasksError("every block must keep at least one token, the last keeps none")
    grown = (keep[1:] & ~keep[:-1]).nonzero()
    if len(grown):
        layer, token = grown[0].tolist()
        raise MasksError(
            f"masks must be nested: block {layer + 2} keeps token {token}, "
            f"block {layer + 1} does not"
        )
    missing = (~keep[:-1, :prefix]).nonzero()
    if len(missing):
        layer, token = missing[0].tolist()
        raise MasksError(f"prefix tokens must be kept: block {layer + 1} prunes token {token}")
    for name, text in (("model", masks.model), ("data", masks.data)):
        if not isinstance(text, str):
            raise MasksError(f"{name} must be text, got {text!r}")
    if masks.tolerance is not None:
        number("tolerance", masks.tolerance, above=0, error=MasksError)
