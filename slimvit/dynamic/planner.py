"""What every dynamic planner is: a module that chooses, for each image, what each block keeps."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from slimvit.checks import wholes
from slimvit.errors import PlanError
from slimvit.models import Spec
from slimvit.ops import Alive, Choice, ChooserParts, View


class Planner(nn.Module):
    """Chooses, for each image, the tokens that each block keeps; the counts are the same for all.

    A new planner is a subclass with a `kind` and a `choose`:

        class Largest(slimvit.Planner):
            kind = "largest"

            def choose(self, layer, view, n):
                return view.top(view.alive.x.norm(dim=-1).t(), n)

        fast = slimvit.accelerate(model, Largest(counts=[197, 180, …, 1]))

    Attributes:
        kind: the planner's name in files, unique.
        counts: n_1 … n_L, tokens that each block keeps, prefix tokens included; None until `bind`
            for a planner that works them out from the model.
        spec: the model's shape, after `bind`.
        semantics: pruned tokens are no keys of later blocks.
        learns: whether `finetune` trains the planner's own weights along with the model's. Places
            have no gradient: weights learn through `Choice.weight`, or through the policy or the
            tokens that `before` returns.
    """

    kind: ClassVar[str] = ""
    kinds: ClassVar[dict[str, type[Planner]]] = {}
    semantics = "drop"
    learns: ClassVar[bool] = False
    spec: Spec | None = None

    def __init__(self, counts: Sequence[int] | None = None) -> None:
        super().__init__()
        self.counts = None if counts is None else wholes("counts", counts, error=PlanError)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" not in cls.__dict__:
            return
        if cls.kind == "static":
            raise PlanError(f"{cls.__qualname__} needs another kind: 'static' is that of masks")
        holder = Planner.kinds.get(cls.kind, cls)
        # The same class again, from a notebook's cell or a reloaded module, is welcome.
        if (holder.__module__, holder.__qualname__) != (cls.__module__, cls.__qualname__):
            raise PlanError(f"the kind {cls.kind!r} is taken by {holder.__qualname__}")
        Planner.kinds[cls.kind] = cls

    def choose(self, layer: int, view: View, n: int) -> Choice:
        """The n tokens that block `layer`, counted from 0, keeps.

        Args:
            layer: from 0 to L - 1.
            view: the block between its keys and its queries; `view.top(scores, n)` helps.
            n: how many to keep, prefix tokens included; None where `count` leaves it open.
        """
        raise PlanError(
            f"{type(self).__name__} has no choose, and block {layer + 1} is to keep {n} of "
            f"{view.alive.x.shape[0]} tokens"
        )

    def parts(self, layer: int) -> ChooserParts | None:
        """How block `layer`, counted from 0, or `before` it, chooses, as compiled kernels read it.

        None where `choose` is all there is; back ends with kernels then leave the model to torch.
        """
        return None

    def before(self, layer: int, alive: Alive) -> Alive:
        """What block `layer`, counted from 0, receives: to remove tokens ahead of its keys."""
        return alive

    def count(self, layer: int, received: int) -> int | None:
        """How many tokens block `layer` keeps of those that it receives after `before`.

        None for as many as `choose`, which is then asked without a number, finds worth it.
        """
        return self.counts[layer]

    @property
    def ragged(self) -> bool:
        """Whether each image keeps a number of tokens of its own, about the counts or up to them.

        In training it does not.
        """
        return False

    @property
    def acts_before(self) -> tuple[int, ...]:
        """Blocks, counted from 0, ahead of which `before` changes anything."""
        if type(self).before is Planner.before:
            return ()
        return tuple(range(self._bound.depth))

    @property
    def chooses(self) -> bool:
        """Whether blocks choose among what they receive, by `choose`."""
        return type(self).choose is not Planner.choose

    def counts_for(self, spec: Spec) -> tuple[int, ...]:
        """n_1 … n_L for a model of this shape."""
        if self.counts is None:
            raise PlanError(f"{self.kind}: counts are missing")
        return self.counts

    def settings(self) -> dict[str, Any]:
        """Arguments that make this planner again, as JSON can hold them; weights apart."""
        return {"counts": None if self.counts is None else list(self.counts)}

    def macs(self, spec: Spec) -> int:
        """Multiply–accumulates of the choosing itself, for one image."""
        return 0

    @property
    def alive(self) -> tuple[int, ...]:
        """Tokens whose keys and values each block computes, after `before`."""
        return (self._bound.tokens, *self.counts[:-1])

    def with_counts(self, counts: Sequence[int]) -> Planner:
        """This plan as it runs on an image of which it keeps so many; to count its work."""
        plan = copy.copy(self)
        plan.counts = tuple(counts)
        return plan

    @property
    def tokens(self) -> int:
        """N, all tokens of the model, prefix included."""
        return self._bound.tokens

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self._bound.grid

    @property
    def prefix(self) -> int:
        """Class, distillation and register tokens, which are always kept."""
        return self._bound.prefix

    @property
    def _bound(self) -> Spec:
        if self.spec is None:
            raise PlanError(f"{self.kind}: bind it to a model first")
        return self.spec

    def bind(self, spec: Spec) -> Planner:
        """A copy for a model of this shape, its counts worked out and checked.

        A plan that is bound already may be bound again to a model with another number of classes.

        Raises:
            PlanError: the plan is of another model, the counts do not fit this one, or the class
                has an `__init__` that leaves out Planner's.
        """
        check_begun(self)
        if self.spec is not None:
            _check_model(self.spec, spec)
        bound = copy.deepcopy(self)
        bound.counts = wholes("counts", self.counts_for(spec), error=PlanError)
        bound.spec = spec
        _check(bound.counts, spec)
        return bound

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; it appears whole or not at all.

        Raises:
            PlanError: the file would not bring the plan back; see `slimvit.dynamic.file`.
            OSError: the folder is missing or not writable, or the disk is full.
        """
        from slimvit.dynamic.file import save

        save(self, path)

    def extra_repr(self) -> str:  # noqa: D102
        return "" if self.counts is None else "kept=" + ",".join(map(str, self.counts))


def check_begun(plan: Planner) -> None:
    """Refuse a plan whose `__init__` leaves out Planner's.

    Raises:
        PlanError: it does.
    """
    if "_modules" not in vars(plan) or not hasattr(plan, "counts"):
        raise PlanError(f"{type(plan).__name__}.__init__ must begin with super().__init__(counts)")


def overrides(plan: Planner, of: type[Planner], *names: str) -> bool:
    """Whether a plan has another method of one of these names than the class `of` it descends from.

    What is known of that class, as kernels know it, is then not known of the plan.
    """
    kind = type(plan)
    return any(name in vars(plan) or getattr(kind, name) is not getattr(of, name) for name in names)


def _shape(spec: Spec) -> str:
    return f"{spec.name} ({spec.depth} blocks, {spec.tokens} tokens, {spec.width} wide)"


def _check_model(wanted: Spec, got: Spec) -> None:
    """Refuse a model of another shape; what its head answers has no say in what is kept."""
    names = (field.name for field in dataclasses.fields(Spec) if field.name != "num_classes")
    pairs = [(name, getattr(wanted, name), getattr(got, name)) for name in names]
    rules = [f"{name} must be {a!r}, got {b!r}" for name, a, b in pairs if a != b]
    if rules:
        raise PlanError(f"the plan is of {_shape(wanted)}, got {_shape(got)}: {'; '.join(rules)}")


def _check(counts: Sequence[int], spec: Spec) -> None:
    if len(counts) != spec.depth:
        raise PlanError(f"counts must be one for each of {spec.depth} blocks, got {len(counts)}")
    if any(b > a for a, b in zip((spec.tokens, *counts), counts, strict=False)):
        raise PlanError(
            f"kept counts must start at N = {spec.tokens} or less and not grow with depth, "
            f"got {list(counts)}"
        )
    if min(counts[:-1], default=spec.prefix) < spec.prefix or counts[-1] < spec.head_tokens:
        raise PlanError(
            f"blocks must keep the {spec.prefix} prefix tokens and the last one the "
            f"{spec.head_tokens} that the head reads, got {list(counts)}"
        )
