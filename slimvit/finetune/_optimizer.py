"""The optimizer of a fine-tuning run, and its schedule."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from slimvit.errors import UsageError
from slimvit.finetune._settings import Settings


def make_optimizer(slim: nn.Module, learns: bool, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; biases, norms and positions without weight decay.

    Args:
        slim: the model.
        learns: whether it has a plan that learns: that one takes the whole rate, the model
            `backbone_rate` of it.
        settings: of the run.

    Raises:
        UsageError: every parameter is frozen.
    """
    if not any(parameter.requires_grad for parameter in slim.parameters()):
        raise UsageError(
            "a parameter of slim must require its gradient, all are frozen: "
            "slim.requires_grad_() lets them learn"
        )
    options = {"opt": "adamw", "lr": settings.lr, "weight_decay": settings.weight_decay}
    if not learns:
        return create_optimizer_v2(slim, **options)
    mine = set(map(id, slim.plan.parameters()))
    groups = []
    for group in param_groups_weight_decay(slim, settings.weight_decay, slim.no_weight_decay()):
        for planned in (True, False):
            chosen = [p for p in group["params"] if (id(p) in mine) is planned]
            scale = 1.0 if planned else settings.backbone_rate
            groups.append({**group, "params": chosen, "lr_scale": scale})
    groups.sort(key=lambda group: group["lr_scale"], reverse=True)
    return create_optimizer_v2([group for group in groups if group["params"]], **options)


def make_schedule(optimizer: torch.optim.Optimizer, settings: Settings, steps: int) -> Scheduler:
    """Warm-up, then a cosine, by the update; `steps` of them make an epoch."""
    s = settings
    warmup = min(s.warmup_epochs, s.epochs / 2)
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=max(s.epochs, 1) - warmup,  # type: ignore[arg-type]
        warmup_epochs=warmup,  # type: ignore[arg-type]
        warmup_prefix=True,  # else the cosine would have fallen by its end
        warmup_lr=s.lr * s.min_lr,
        min_lr=s.lr * s.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    return schedule
