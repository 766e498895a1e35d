"""Planners that tests write, and models with them."""

from __future__ import annotations

import torch
from references import build
from torch import nn

from slimvit import Absorb, Planner, apply_masks, models
from slimvit.dynamic import Choice, View
from slimvit.models import spec
from slimvit.search.features import Features
from slimvit.search.image_scores import block_scores
from slimvit.search.scores import eq6

EXACT = 1e-11
FLOAT32 = 1e-5


class Largest(Planner):
    """The forty lines that a user writes: the tokens of the largest weighted norm."""

    kind = "test-largest"

    def __init__(self, counts, *, width: int, power: float = 1.0) -> None:
        super().__init__(counts)
        self.width, self.power = width, power
        self.weight = nn.Parameter(torch.linspace(0.1, 1, width))

    def choose(self, layer: int, view: View, n: int) -> Choice:
        weighted = view.alive.x * self.weight
        return view.top(weighted.norm(dim=-1).t() ** self.power, n)

    def settings(self):
        return super().settings() | {"width": self.width, "power": self.power}

    def macs(self, spec) -> int:
        pairs = zip(self.alive, self.counts, strict=True)
        return sum(m * self.width for m, n in pairs if self.prefix < n < m)


class Reverse(Largest):
    """The last patches, by a rule without weights."""

    kind = "test-reverse"

    def choose(self, layer: int, view: View, n: int) -> Choice:
        return view.top(view.alive.place, n)


def falling(model: nn.Module, last: int | None = None) -> list[int]:
    """Counts that fall by about a third of the patches from block to block."""
    shape = spec(model)
    counts = [shape.prefix + max(1, shape.patches * 2**i // 3**i) for i in range(1, shape.depth)]
    return [*counts, shape.head_tokens if last is None else last]


def plans(model: nn.Module, last: int | None = None) -> dict[str, Planner]:
    counts = falling(model, last)
    return {
        "absorb": Absorb(counts=counts),
        "largest": Largest(counts, width=spec(model).width),
        "reverse": Reverse(counts, width=spec(model).width),
    }


def pair(
    kind: str = "absorb", name: str = "deit", dtype: torch.dtype = torch.float64, last=None
) -> tuple[nn.Module, nn.Module]:
    model = build(name).to(dtype)
    return model, apply_masks(model, plans(model, last)[kind])


KINDS = ("absorb", "largest", "reverse")


class TrueScores(Planner):
    """What `DPS` would do if its predictions were exact; `look` first at the images to come."""

    scores: torch.Tensor | None = None  # [L - 1, B, N]

    def look(self, dense: nn.Module, images: torch.Tensor) -> None:
        spec = self._bound
        with models.evaluating(dense):
            features = Features(dense, [images], cache_bytes=1 << 40, progress=False)
            try:
                found = dict(block_scores(dense, features, spec, self.counts, eq6))
            finally:
                features.close()
        self.scores = torch.stack([found[t][0] for t in range(1, spec.depth)])

    def choose(self, layer: int, view: View, n: int) -> Choice:
        return view.top(self.scores[layer].gather(1, view.alive.place), n)
