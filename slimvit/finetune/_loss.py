"""What a slim model learns from: the dense model's answers, and labels where there are any."""

from __future__ import annotations

import torch
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


def keep_loss(shares: Tensor, wanted: Tensor) -> Tensor:
    """Σ_stage (share kept − wanted share)², the mean over images.

    Args:
        shares: of the patches kept of each image, [b, stages].
        wanted: [stages].

    Source: SPViT (Kong et al., ECCV 2022), section 3.5; as in inference each image has to keep
    its share, not the batch.
    """
    return (shares.float() - wanted).square().sum(1).mean()


def token_loss(student: Tensor, teacher: Tensor, policy: Tensor) -> Tensor:
    """Mean squared difference of the kept tokens, each normalised to mean 0 and variance 1.

    Without that a few channels of great values are all that counts.

    Args:
        student: [b, P, D].
        teacher: [b, P, D].
        policy: 1 for kept tokens, else 0: [b, P].
    """
    width = student.shape[-1:]
    a, b = (F.layer_norm(x.float(), width) for x in (student, teacher))
    error = (a - b).square().mean(-1) * policy
    return error.sum() / policy.sum().clamp_min(1)


def class_loss(student: Tensor, teacher: Tensor, targets: Tensor, weight: float) -> Tensor:
    """Cross-entropy + weight · KL(softmax(teacher) ‖ softmax(student)); labels where there are any.

    Args:
        student: logits, [b, C].
        teacher: logits, [b, C].
        targets: classes, [b] int64; negative ones have no label.
        weight: of the teacher.
    """
    none = torch.full_like(targets, -1)
    soft = distillation_loss(student, teacher, none, temperature=1.0, alpha=0.0)
    known = targets >= 0
    hard = F.cross_entropy(student[known], targets[known]) if known.any() else 0.0
    return hard + weight * soft
