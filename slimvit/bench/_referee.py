"""What every row is compared with before it is timed: float32 answers in plain PyTorch."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from slimvit.bench._report import Row
from slimvit.bench._runtimes import Runtime, SlimvitStatic, Workload
from slimvit.bench._verify import agreement, verify, verify_kept, verify_plan
from slimvit.export import sample_images
from slimvit.macs import cut
from slimvit.models import spec
from slimvit.runtime import apply_masks

_IMAGES = 8


class Referee:
    """Verifies rows against the dense model, `apply_masks`, and its static twin where it has one.

    Args:
        work: model, masks or plan, and images.
    """

    def __init__(self, work: Workload) -> None:
        self._work = work

    def row(self, runtime: Runtime, pruned: bool) -> Row:
        """The row of a runtime that is ready, once it has answered right.

        Raises:
            MismatchError: its logits, or the tokens that it keeps, are not the reference's.
        """
        label, precision, plan = runtime.label, runtime.precision, self._work.plan
        if isinstance(runtime, SlimvitStatic):
            error = verify(label, True, precision, self._logits(runtime), self._twin)
            saved = cut(spec(self._work.model), self._work.static)
            return Row(label, True, precision, error, plan="static", cut=saved)
        if not pruned or plan is None:
            wanted = self._slim if pruned else self._dense
            error = verify(label, pruned, precision, self._logits(runtime), wanted)
            return Row(label, pruned, precision, error, plan="static" if pruned else "")
        return self._planned(runtime)

    @torch.inference_mode()
    def _planned(self, runtime: Runtime) -> Row:
        label, precision, plan = runtime.label, runtime.precision, self._work.plan
        assert plan is not None
        network, share = self._work.network(True), None
        got = torch.cat([runtime(images).cpu().clone() for images in self._batches])
        wanted = torch.cat([network(images).cpu() for images in self._batches])
        error = verify_plan(label, precision, got, wanted)
        kept = [runtime.kept_sets(images) for images in self._batches]
        if all(sets is not None for sets in kept):
            right = [network.kept_sets(images) for images in self._batches]
            pairs = zip(kept, right, strict=True)
            shares = torch.cat([agreement(ours, theirs, plan) for ours, theirs in pairs])
            share = verify_kept(label, precision, shares)
        return Row(label, True, precision, error, plan=plan.kind, agreement=share)

    @cached_property
    def _batches(self) -> list[Tensor]:
        """The sample batch, and others until there are some images: one alone may keep others."""
        first = self._work.images
        count = -(-_IMAGES // len(first))
        shape = tuple(first.shape[1:])
        more = [sample_images(shape, len(first), seed) for seed in range(1, count)]
        return [first, *(images.to(first.device) for images in more)]

    @torch.inference_mode()
    def _logits(self, run: Runtime | torch.nn.Module) -> Tensor:
        return run(self._work.images)[:_IMAGES].cpu()

    @cached_property
    def _dense(self) -> Tensor:
        return self._logits(self._work.network(False))

    @cached_property
    def _slim(self) -> Tensor:
        return self._logits(self._work.network(True))

    @cached_property
    def _twin(self) -> Tensor:
        return self._logits(apply_masks(self._work.model, self._work.static).eval())
