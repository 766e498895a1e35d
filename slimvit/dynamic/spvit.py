"""SPViT: selectors between blocks prune patches of each image into package tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimvit.checks import number, numbers, wholes
from slimvit.dynamic.planner import Planner, overrides
from slimvit.dynamic.seeded import seeded
from slimvit.dynamic.selector import Selector
from slimvit.errors import PlanError
from slimvit.models import Spec
from slimvit.ops import Alive, SelectorParts, take, top

KEEP = (0.7, 0.49, 0.343)


class Stage(NamedTuple):
    """Blocks between two selectors.

    Attributes:
        layer: the block that the selector stands before, counted from 0.
        before: patches that reach the selector.
        patches: patches that it keeps; the others go into one package token.
        packages: package tokens there are before it.
    """

    layer: int
    before: int
    patches: int
    packages: int


class SPViT(Planner):
    """A few selectors prune patches; what a selector prunes lives on as one package token.

    Before block l of a stage, with P(i) the selector's probability of keeping patch i,

        kept = the n patches of the highest P;  package = Σ_pruned P(i) x_i / Σ_pruned P(i)

    and the blocks from there on compute the prefix tokens, the kept patches, and the packages,
    which are never pruned. In training nothing is removed: decisions are drawn by a hard
    Gumbel-softmax, and a token that was pruned is no key of any later block. `finetune` trains
    selectors and backbone; before that the selectors' weights are random, the same in every
    process.

    Args:
        keep: share of all patches that each selector leaves, falling, in (0, 1]; one that prunes
            nothing, being 1 or too near the one before, is left out.
        stages: the blocks that they stand before, counted from 0, rising, the last block excluded;
            None spreads them evenly: 3, 6, 9 of 12.
        argmax: keep each patch that P favours, instead of a fixed number: each image keeps a
            number of its own.
        temperature: of the Gumbel-softmax in training.

    Raises:
        PlanError: a ratio or a stage out of range or out of order.

    Source: SPViT (Kong et al., ECCV 2022), sections 3.2 to 3.4. Its package is a plain sum in
    training and a plain mean in inference; here both are the weighted mean.
    """

    kind = "spvit"
    learns = True

    def __init__(
        self,
        keep: Sequence[float] = KEEP,
        *,
        stages: Sequence[int] | None = None,
        argmax: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.keep = numbers("keep", keep, above=0, most=1, error=PlanError)
        self.stages = None if stages is None else wholes("stages", stages, error=PlanError)
        if argmax not in (True, False):
            raise PlanError(f"argmax must be True or False, got {argmax!r}")
        self.argmax = bool(argmax)
        self.temperature = number("temperature", temperature, above=0, error=PlanError)
        self.selectors = nn.ModuleDict()
        self._stage_at: dict[int, Stage] = {}
        _check(self.keep, self.stages)

    def bind(self, spec: Spec) -> SPViT:
        """A copy for a model of this shape, with a selector for each stage that prunes."""
        if spec.width % spec.heads:
            raise PlanError(
                f"spvit: the width must be a multiple of the heads, "
                f"got {spec.width} and {spec.heads}"
            )
        bound = super().bind(spec)
        bound._stage_at = {stage.layer: stage for stage in bound.plan_stages(spec)}
        if not bound.selectors:
            with seeded(0):
                for layer, stage in bound._stage_at.items():
                    start = stage.patches / stage.before
                    bound.selectors[str(layer)] = Selector(spec.width, spec.heads, start)
        return bound

    def plan_stages(self, spec: Spec) -> list[Stage]:
        """The stages that prune anything of a model of this shape."""
        count = len(self.keep)
        layers = self.stages or tuple(spec.depth * (i + 1) // (count + 1) for i in range(count))
        if layers[-1] >= spec.depth - 1 or len(set(layers)) < count:
            raise PlanError(
                f"stages must be different blocks from 0 to {spec.depth - 2} of the {spec.depth} "
                f"(the last one computes only what the head reads), got {list(layers)}"
            )
        stages: list[Stage] = []
        before = spec.patches
        for layer, ratio in zip(layers, self.keep, strict=True):
            patches = max(1, round(ratio * spec.patches))
            if patches < before:
                stages.append(Stage(layer, before, patches, len(stages)))
                before = patches
        return stages

    def counts_for(self, spec: Spec) -> tuple[int, ...]:
        """All tokens, then of each stage prefix, patches and packages; the head's at the end."""
        return (*self._received(spec)[:-1], spec.head_tokens)

    def _received(self, spec: Spec) -> list[int]:
        """Tokens that each block gets, after the selector before it."""
        received = [spec.tokens] * spec.depth
        for stage in self.plan_stages(spec):
            tokens = spec.prefix + stage.patches + stage.packages + 1
            received[stage.layer :] = [tokens] * (spec.depth - stage.layer)
        return received

    @property
    def alive(self) -> tuple[int, ...]:
        """Tokens whose keys and values each block computes: those that its selector leaves."""
        received = super().alive[1:]
        return (*received, *received[-1:])

    @property
    def ragged(self) -> bool:
        """Whether selectors keep what they favour."""
        return self.argmax

    @property
    def acts_before(self) -> tuple[int, ...]:
        """Blocks that a selector stands before."""
        return tuple(self._stage_at)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of all patches that each selector leaves."""
        return tuple(stage.patches / self._bound.patches for stage in self._stage_at.values())

    def count(self, layer: int, received: int) -> int:
        """All that block `layer` receives; the last block what the head reads."""
        return received if layer < self._bound.depth - 1 else self.counts[-1]

    def before(self, layer: int, alive: Alive) -> Alive:
        """Prune the patches that the selector chooses, and add their package."""
        stage = self._stage_at.get(layer)
        if stage is None:
            return alive
        if self.training:
            return self._mask(layer, alive, stage)
        return self.prune(layer, alive, None if self.argmax else stage.patches)

    def parts(self, layer: int) -> SelectorParts | None:
        """The selector before block `layer`, as compiled kernels read it.

        None where none is, and for a subclass that prunes, or a selector that judges, in another
        way.
        """
        stage = self._stage_at.get(layer)
        if stage is None or overrides(self, SPViT, "before", "prune", "count", "choose"):
            return None
        selector = self.selectors[str(layer)]
        if type(selector) is not Selector:
            return None
        patches = None if self.argmax else stage.patches
        return SelectorParts(selector, patches, stage.packages, self._fewest(stage))

    def prune(self, layer: int, alive: Alive, patches: int | None) -> Alive:
        """Let the selector before block `layer` choose among the alive patches.

        Args:
            layer: a block that a selector stands before.
            alive: prefix, patches and the packages of earlier stages.
            patches: how many to keep; None for as many as the selector favours, of one image.
        """
        stage = self._stage_at[layer]
        parts = _Parts(alive, self.prefix, stage.packages, self.tokens)
        logits = self.selectors[str(layer)](parts.patches)
        score = logits[..., 0] - logits[..., 1]
        if patches is None:
            patches = _favoured(score, self._fewest(stage))
        index = top(score, patches, 0)
        kept = torch.zeros_like(score, dtype=torch.bool).scatter(1, index, 1)
        weights = F.log_softmax(logits, -1)[..., 0].masked_fill(kept, -torch.inf).softmax(1)
        place = parts.place.gather(1, index)
        return parts.join(take(parts.patches, index), place, weights)

    def _fewest(self, stage: Stage) -> int:
        """Patches that a stage keeps at least: later ones, too, have to keep one and prune one."""
        return len(self._stage_at) - stage.packages

    def _mask(self, layer: int, alive: Alive, stage: Stage) -> Alive:
        """In training: every patch stays a row, but what is pruned is no key any more."""
        parts = _Parts(alive, self.prefix, stage.packages, self.tokens)
        previous = parts.policy
        logits = self.selectors[str(layer)](parts.patches, previous)
        decided = self.decide(logits, previous, stage) * previous
        pruned = previous - decided
        chance = F.log_softmax(logits, -1)[..., 0]
        weights = (chance - chance.amax(1, keepdim=True)).exp() * pruned
        weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-12)
        some = pruned.detach().amax(1, keepdim=True)  # without any there is no package
        return parts.join(parts.patches, parts.place, weights, decided, some)

    def decide(self, logits: Tensor, previous: Tensor, stage: Stage) -> Tensor:
        """Whether each patch is kept in training, drawn at random: 0 or 1, [B, p].

        Args:
            logits: for keeping and for pruning, [B, p, 2].
            previous: 0 for those pruned by an earlier stage, else 1: [B, p].
            stage: which stage decides.

        Returns:
            Hard decisions with the gradient of soft ones.
        """
        return F.gumbel_softmax(logits, tau=self.temperature, hard=True)[..., 0]

    def settings(self) -> dict[str, Any]:
        """Ratios, stages, and how to decide."""
        return {
            "keep": list(self.keep),
            "stages": None if self.stages is None else list(self.stages),
            "argmax": self.argmax,
            "temperature": self.temperature,
        }

    def macs(self, spec: Spec) -> int:
        """Selectors on the patches that reach them, and the means that make the packages."""
        work = 0
        for stage in self.plan_stages(spec):
            patches = stage.before
            if stage.packages:  # an image may have come to keep another number
                patches = self.counts[stage.layer - 1] - spec.prefix - stage.packages
            work += Selector.macs(spec.width, spec.heads, patches) + patches * spec.width
        return work

    def extra_repr(self) -> str:  # noqa: D102
        return f"keep={self.keep}, {super().extra_repr()}".rstrip(", ")


class _Parts:
    """The tokens that reach a selector: prefix, patches, packages."""

    def __init__(self, alive: Alive, prefix: int, packages: int, tokens: int) -> None:
        self.alive, self._stands = alive, tokens + packages
        self._split = (prefix, alive.x.shape[0] - prefix - packages, packages)
        self.patches = alive.x.split(self._split)[1]  # [p, B, D]
        self.place = alive.place.split(self._split, 1)[1]  # [B, p]

    @property
    def policy(self) -> Tensor:
        """Of the patches, float32 [B, p]."""
        return self._policy.split(self._split, 1)[1]

    @property
    def _policy(self) -> Tensor:
        if self.alive.policy is not None:
            return self.alive.policy
        return torch.ones_like(self.alive.place, dtype=torch.float32)

    def join(
        self,
        patches: Tensor,
        place: Tensor,
        weights: Tensor,
        policy: Tensor | None = None,
        package_policy: Tensor | None = None,
    ) -> Alive:
        """The tokens again, with other patches, and a package of the old ones after the others.

        Args:
            patches: [n, B, D].
            place: theirs, [B, n].
            weights: of the old patches in the package, [B, p].
            policy: of the patches, [B, n], and
            package_policy: of the package, [B, 1]; None where nothing is masked.
        """
        x, places = self.alive.x.split(self._split), self.alive.place.split(self._split, 1)
        package = weights.to(x[1].dtype).unsqueeze(1) @ x[1].transpose(0, 1)  # [B, 1, D]
        stands = place.new_full((place.shape[0], 1), self._stands)
        policies = None
        if policy is not None:
            old = self._policy.split(self._split, 1)
            policies = torch.cat([old[0], policy, old[2], package_policy], 1)
        return Alive(
            torch.cat([x[0], patches, x[2], package.transpose(0, 1)]),
            torch.cat([places[0], place, places[2], stands], 1),
            policy=policies,
        )


def _favoured(score: Tensor, fewest: int) -> int:
    if score.shape[0] > 1:
        raise PlanError(
            "spvit with argmax keeps another number of patches of each image: "
            f"it takes one image a call, got {score.shape[0]}"
        )
    # One patch at least is pruned: the package is a mean over some.
    return min(max(fewest, int((score > 0).sum())), score.shape[1] - 1)


def _check(keep: tuple[float, ...], stages: tuple[int, ...] | None) -> None:
    if not keep:
        raise PlanError("keep must be ratios, one for each stage, got none")
    if any(b >= a for a, b in itertools.pairwise(keep)):
        raise PlanError(f"keep must fall from stage to stage, got {list(keep)}")
    if stages is None:
        return
    if len(stages) != len(keep):
        raise PlanError(f"stages must be as many as keep, {len(keep)}, got {list(stages)}")
    if min(stages) < 0 or any(b <= a for a, b in itertools.pairwise(stages)):
        raise PlanError(f"stages must be rising block numbers from 0, got {list(stages)}")
