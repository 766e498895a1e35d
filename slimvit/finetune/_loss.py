"""What a slim model learns from: the dense model's answers, and labels where there are any."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(
    student: Tensor, teacher: Tensor, targets: Tensor, *, temperature: float, alpha: float
) -> Tensor:
    """(1 - a) · T² · KL(softmax(teacher / T) ‖ softmax(student / T)) + a · cross-entropy.

    Args:
        student: logits, [b, C].
        teacher: logits, [b, C].
        targets: classes, [b] int64; negative ones have no label.
        temperature: T.
        alpha: a, the weight of the labels in [0, 1]; taken as 0 when no image has a label.

    Returns:
        The mean over images, a scalar.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network (2015), section 2.
    """
    log_student, log_teacher = (
        F.log_softmax(logits / temperature, -1) for logits in (student, teacher)
    )
    soft = F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")
    soft = soft * temperature**2
    known = targets >= 0
    if alpha == 0 or not known.any():
        return soft
    return (1 - alpha) * soft + alpha * F.cross_entropy(student[known], targets[known])


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """‖student − teacher‖² / ‖teacher‖² over the batch, for models that have no classes."""
    return F.mse_loss(student, teacher) / teacher.square().mean().clamp_min(1e-12)
