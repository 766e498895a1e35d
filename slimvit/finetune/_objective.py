"""What a batch costs: the student's answer against the teacher's and the labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimvit.dynamic import SPViT
from slimvit.evaluate import check_labels
from slimvit.finetune._loss import (
    class_loss,
    distillation_loss,
    feature_loss,
    keep_loss,
    token_loss,
)
from slimvit.finetune._settings import Settings
from slimvit.finetune._student import Answer, Teacher, plan_of
from slimvit.models import spec


class Objective:
    """Distillation; with SPViT's selectors its four losses.

        selectors:  CE + a · KL + b · Σ_stage (share kept − share wanted)² + c · MSE(tokens)
        otherwise:  (1 − alpha) · T² · KL + alpha · CE

    Where the models have no classes, the features' relative error stands for KL and CE.

    Args:
        slim: the student.
        dense: the teacher.
        settings: of the run.
    """

    def __init__(self, slim: nn.Module, dense: nn.Module, settings: Settings) -> None:
        self.settings = settings
        plan = plan_of(slim)
        self._wanted = plan.shares if isinstance(plan, SPViT) else ()
        self._features = getattr(dense, "num_classes", 1) == 0
        uses_labels = bool(self._wanted) or settings.alpha > 0
        self._classes = spec(dense).num_classes if uses_labels and not self._features else None
        self.teacher = Teacher(dense, bool(self._wanted) and settings.token_weight > 0)

    def check(self, targets: Tensor) -> None:
        """Refuse labels that are no classes of the models, where labels count.

        Args:
            targets: classes, [b] int64, on whatever device; negative ones have no label.

        Raises:
            UsageError: one is too great.
        """
        if self._classes is not None:
            check_labels(targets, self._classes)

    def __call__(
        self, student: Answer, teacher: Tensor, tokens: Tensor | None, targets: Tensor
    ) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            student: its answer.
            teacher: the teacher's logits [b, C], and
            tokens: its patches [b, P, D], or None, both from `self.teacher`.
            targets: classes, [b] int64; negative ones have no label.
        """
        s, logits, teacher = self.settings, student.logits.float(), teacher.float()
        if student.shares is None:
            if self._features:
                return feature_loss(logits, teacher)
            return distillation_loss(
                logits, teacher, targets, temperature=s.temperature, alpha=s.alpha
            )
        if self._features:
            loss = s.class_weight * feature_loss(logits, teacher)
        else:
            loss = class_loss(logits, teacher, targets, s.class_weight)
        wanted = torch.tensor(self._wanted, dtype=torch.float32, device=logits.device)
        loss = loss + s.keep_weight * keep_loss(student.shares, wanted)
        if tokens is not None:
            loss = loss + s.token_weight * token_loss(student.tokens, tokens, student.policy)
        return loss
