"""Distillation of a slim model from the dense one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from slimvit.checks import iterable
from slimvit.evaluate import check_modules
from slimvit.finetune._random import generators_kept
from slimvit.finetune._run import Loader, Result, Run
from slimvit.finetune._settings import Settings
from slimvit.models import evaluating, own_precision, refuse_inference_mode


def finetune(
    slim: nn.Module,
    dense: nn.Module,
    loader: Loader,
    *,
    val_loader: Loader | None = None,
    output: str | Path | None = None,
    restart: bool = False,
    info: dict[str, Any] | None = None,
    progress: bool = True,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,
) -> Result:
    """Fine-tune a slim model by distillation from the dense one, and labels where there are any.

    A dynamic plan stays as it is, but for one that learns: SPViT's selectors are trained with the
    model by SPViT's losses, at first alone. Under torch.distributed every process trains on its
    own shard, with averaged gradients. The generators of random numbers are seeded for the run and
    then as they were. Only `amp` says where autocast is on, not the code around the call.

    Args:
        slim: what `apply_masks` returns, in float32; trained in place.
        dense: the teacher, in float32, on the same device; not changed.
        loader: batches (images [b, C, H, W], of any floating dtype, targets [b] int64, negative for
            no label); has a length, and its attribute `epoch` is set where it has one.
        val_loader: images to evaluate on before the first and after every epoch.
        output: safetensors file for the weights, in timm's names, written whole after each epoch;
            `<stem>.resume.safetensors` beside it lets the same call go on after a kill, and
            `<stem>.plan.safetensors` is the dynamic plan, if there is one, as it was trained. A
            call with other settings, weights, images or labels, or an edited file of a planner,
            is refused. Known of the data is what takes no random draw: files of an ImageFolder,
            tensors of a list of batches or of a TensorDataset, `targets` of any dataset; of other
            data `info` may tell.
        restart: start over even where such a file is.
        info: plain values about model and data: kept in the output, and part of what tells one
            run from another.
        progress: show a progress bar.
        on_epoch: called with the report of each epoch.
        settings: the fields of `Settings`: epochs, lr, temperature, alpha, amp, ema_decay, …

    Raises:
        UsageError: torch.inference_mode is on, a setting out of range, a model that is no module,
            not in float32 or frozen as a whole, the models differ in classes or image size,
            `output` is a device or cannot be written, a loader cannot be gone through or has no
            length, or a batch is not (images, targets) of these shapes or has labels, where they
            count, that are no classes of the models.
        DataError: there is no image to train on.
        PlanError: the plan has no kind to be saved under, and `output` is given.
        CheckpointError: the unfinished run beside `output` is another one, or cannot be read.
        SlimvitError: a loss or gradient that is not finite; the last epoch's files remain.
    """
    check_modules(slim=slim, dense=dense)
    refuse_inference_mode("finetune")
    if val_loader is not None:
        iterable("val_loader", val_loader)
    device = next(slim.parameters()).device
    with evaluating(dense), generators_kept(device), own_precision():
        run = Run(slim, dense, loader, Settings(**settings), output, info or {})
        run.val_loader, run.progress, run.on_epoch = val_loader, progress, on_epoch
        return run.train(restart)
