"""What the loss sees of student and teacher in one forward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from slimvit.checks import dtype_name
from slimvit.dynamic import Planner, SPViT
from slimvit.errors import UsageError
from slimvit.evaluate import image_shape
from slimvit.models import block_module, spec


class Answer(NamedTuple):
    """A student's answer to a batch.

    Attributes:
        logits: [b, C].
        shares: share of the patches that each selector leaves of each image, with a gradient,
            [b, stages]; None without selectors, as are the others.
        tokens: patches that the last block receives, pruned ones among them, [b, P, D].
        policy: 1 for those of them that are kept, else 0: [b, P].
    """

    logits: Tensor
    shares: Tensor | None = None
    tokens: Tensor | None = None
    policy: Tensor | None = None


class Student(nn.Module):
    """A slim model whose forward gives an `Answer`."""

    def __init__(self, slim: nn.Module) -> None:
        super().__init__()
        self.slim = slim

    def forward(self, images: Tensor) -> Answer:
        """The answer to images [b, C, H, W]."""
        plan = plan_of(self.slim)
        if not isinstance(plan, SPViT) or not plan.acts_before:
            return Answer(_one(self.slim(images)))
        logits, left = self.slim.trace(images)
        patches = slice(plan.prefix, plan.tokens)
        policies = [left[layer].policy[:, patches] for layer in plan.acts_before]
        shares = torch.stack([policy.mean(1) for policy in policies], 1)
        tokens = left[-2].x.transpose(0, 1)[:, patches]
        return Answer(_one(logits), shares, tokens, policies[-1].detach())


class Teacher:
    """The dense model, asked for its logits and, if wanted, for what its last block receives.

    It has to be in evaluation mode.
    """

    def __init__(self, dense: nn.Module, want_tokens: bool) -> None:
        self.dense, self.want_tokens = dense, want_tokens
        shape = spec(dense)
        self._last, self._prefix = block_module(dense, shape.depth), shape.prefix

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [b, C] and patches [b, P, D] or None."""
        if not self.want_tokens:
            return self.dense(images), None
        seen: list[Tensor] = []
        hook = self._last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = self.dense(images)
        finally:
            hook.remove()
        return logits, seen[0][:, self._prefix :]


def plan_of(slim: nn.Module) -> Planner | None:
    """The dynamic plan of a slim model, or None where it has masks."""
    return getattr(slim, "plan", None)


def _one(logits: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The mean of a distilled model's two answers, which timm gives apart if told to."""
    return sum(logits) / 2 if isinstance(logits, tuple) else logits


def check_models(slim: nn.Module, dense: nn.Module) -> None:
    """Refuse models that cannot be student and teacher of each other.

    Raises:
        UsageError: one is not in float32, or they differ in classes or image size.
    """
    _check_dtype("slim", slim)
    _check_dtype("dense", dense)
    pairs = {
        "number of classes": [getattr(model, "num_classes", None) for model in (slim, dense)],
        "image shape": [image_shape(model) for model in (slim, dense)],
    }
    for name, (own, wanted) in pairs.items():
        if None not in (own, wanted) and own != wanted:
            raise UsageError(f"slim must have the {name} of dense, {wanted}, got {own}")


def _check_dtype(name: str, model: nn.Module) -> None:
    others = {p.dtype for p in model.parameters()} - {torch.float32}
    if others:
        found = ", ".join(sorted(map(dtype_name, others)))
        raise UsageError(
            f"{name} must be in float32 for fine-tuning, got {found}: give {name}.float(); amp "
            "computes in half precision where it pays"
        )
