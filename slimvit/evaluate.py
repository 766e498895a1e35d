"""How well a slim model answers: top-1, top-5 and agreement with the dense model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import accuracy
from torch import Tensor, nn
from tqdm import tqdm

from slimvit.checks import iterable
from slimvit.errors import DataError, SlimvitError, UsageError
from slimvit.models import evaluating
from slimvit.runtime.accelerated import AcceleratedViT


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured; percentages, None where there is nothing to measure them on.

    Attributes:
        images: how many images both models answered.
        labelled: how many of them have a label.
        top1: share of labels that are the slim model's first answer.
        top5: share of labels among its first five.
        dense_top1: the dense model's top-1 on the same images.
        dense_top5: and its top-5.
        agreement: share of images on which both give the same first answer; None for models
            that give features instead of classes.
        divergence: mean KL(dense ‖ slim) of the answers, in nats; None for models that give
            features.
        cosine: mean cosine between the outputs of both, in [-1, 1].
    """

    images: int
    labelled: int
    top1: float | None
    top5: float | None
    dense_top1: float | None
    dense_top5: float | None
    agreement: float | None
    divergence: float | None
    cosine: float


@torch.inference_mode()
def evaluate(
    dense: nn.Module,
    slim: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str | None = None,
    progress: bool = False,
    reduce: bool = False,
) -> Evaluation:
    """Run both models on the same images and compare their answers.

    Both are in evaluation mode for the call, in which they draw no random numbers; then each of
    their modules is in the mode in which it was.

    Args:
        dense: the reference, in any floating dtype.
        slim: the slimmed model, same call, in any floating dtype.
        loader: batches (images [b, C, H, W], of any floating dtype, targets [b] int64, negative for
            no label); empty ones are passed over.
        device: where the models are; by default that of the dense model's parameters.
        progress: show a progress bar.
        reduce: sum over the processes of torch.distributed, each with its own shard.

    Raises:
        DataError: the loader gives no image.
        UsageError: a model is no module, the loader cannot be gone through, a batch is not (images,
            targets) of these shapes, a label is no class of the models, or their answers differ in
            shape.
        SlimvitError: an output is NaN or infinite.
    """
    check_modules(dense=dense, slim=slim)
    loader = iterable("loader", loader)
    device = torch.device(device) if device else next(dense.parameters()).device
    classes = getattr(dense, "num_classes", 1) > 0
    shape, sums = image_shape(slim) or image_shape(dense), torch.zeros(9, dtype=torch.float64)
    bar = tqdm(loader, "evaluate", unit="batch", disable=None if progress else True, leave=False)
    with evaluating(dense), evaluating(slim):
        for batch in bar:
            images, targets = read_batch(batch, shape)
            if not len(targets):
                continue
            answers = _answers(dense, slim, images.to(device, non_blocking=True))
            if classes:
                check_labels(targets, answers["dense"].shape[1])
            sums += _count(**answers, targets=targets.to(device), classes=classes).cpu()
    if reduce and dist.is_initialized():
        sums = _sum_over_processes(sums, device)
    return _percentages(sums.tolist(), classes)


def check_modules(**models: object) -> None:
    """Refuse what is no model.

    Raises:
        UsageError: one is no module of PyTorch.
    """
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise UsageError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")


def image_shape(model: nn.Module) -> tuple[int, ...] | None:
    """Channels, height and width of the images that a model takes; None where it does not tell."""
    model = getattr(model, "_orig_mod", model)  # compiled
    embedding = getattr(model, "patch_embed", None)
    sides = getattr(embedding, "img_size", None)
    chans = getattr(getattr(embedding, "proj", None), "in_channels", None)
    if sides is None or chans is None:
        return getattr(model, "image_shape", None)
    return (chans, *sides)


def check_labels(targets: Tensor, classes: int) -> None:
    """Refuse labels [b] that are no classes; negative ones are none.

    Raises:
        UsageError: one is too great.
    """
    if (worst := int(targets.max())) >= classes:
        raise UsageError(f"targets must be below {classes}, the number of classes, got {worst}")


def read_batch(batch: object, shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Images [b, …] and targets [b] int64 of a batch.

    Args:
        batch: (images, targets); b may be 0.
        shape: channels, height and width that the images must have; None for any.

    Raises:
        UsageError: it is no such pair; soft labels, [b, C], are none either.
    """
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        got = type(batch).__name__
        got += f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise UsageError(f"batches must be (images, targets), got {got}")
    images, targets = batch
    if not (isinstance(images, Tensor) and isinstance(targets, Tensor)):
        kinds = f"({type(images).__name__}, {type(targets).__name__})"
        raise UsageError(f"batches must be tensors (images, targets), got {kinds}")
    if targets.numel():  # an empty batch's images have no shape
        _check_images(images, shape)
    dtype, count = targets.dtype, images.shape[:1]
    whole = dtype != torch.bool and not (dtype.is_floating_point or dtype.is_complex)
    if targets.shape != count or not whole:
        raise UsageError(
            f"targets must be classes [b] = {list(count)}, whole numbers, negative for no label, "
            f"got {list(targets.shape)} {str(dtype).removeprefix('torch.')}"
        )
    return images, targets.long()


def _check_images(images: Tensor, shape: tuple[int, ...] | None) -> None:
    if images.is_floating_point() and shape in (None, tuple(images.shape[1:])):
        return
    sides = "…" if shape is None else ", ".join(map(str, shape))
    got = f"{list(images.shape)} {str(images.dtype).removeprefix('torch.')}"
    raise UsageError(f"images must be [b, {sides}], floating-point, got {got}")


def _answers(dense: nn.Module, slim: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What both models answer, [b, C] by name, checked."""
    answers = {"dense": _answer(dense, images), "slim": _answer(slim, images)}
    for name, answer in answers.items():
        if not answer.isfinite().all():
            raise SlimvitError(f"the {name} model's outputs must be finite, got NaN or infinity")
    wanted, got = (list(answer.shape) for answer in answers.values())
    if got != wanted:
        raise UsageError(f"slim must answer in dense's shape, {wanted}, got {got}")
    return answers


def _answer(model: nn.Module, images: Tensor) -> Tensor:
    """Logits in float32. Accelerated models take images of any dtype, others of their own."""
    if not isinstance(getattr(model, "_orig_mod", model), AcceleratedViT):  # compiled ones too
        dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
        images = images.to(next(dtypes, images.dtype))
    return model(images).float()


def _count(dense: Tensor, slim: Tensor, targets: Tensor, classes: bool) -> Tensor:
    """Images, labelled ones, hits in top 1 and 5 of both, agreements, KL, cosines: sums, [9]."""
    known = targets >= 0
    labelled = int(known.sum()) if classes else 0
    hits = [torch.zeros((), device=dense.device)] * 4
    if labelled:
        pairs = [accuracy(answer[known], targets[known], (1, 5)) for answer in (slim, dense)]
        hits = [percent * labelled / 100 for pair in pairs for percent in pair]
    agree = (slim.argmax(1) == dense.argmax(1)).sum()
    slim, dense = slim.double(), dense.double()
    answers = slim.log_softmax(1), dense.log_softmax(1)
    divergence = F.kl_div(*answers, reduction="sum", log_target=True)
    cosine = F.cosine_similarity(slim, dense).sum()
    counts = torch.tensor([len(targets), labelled], device=dense.device)
    return torch.cat([counts.double(), torch.stack([*hits, agree, divergence, cosine]).double()])


def _sum_over_processes(sums: Tensor, device: torch.device) -> Tensor:
    sums = sums.to(device if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(sums)
    return sums.cpu()


def _percentages(sums: list[float], classes: bool) -> Evaluation:
    images, labelled, *hits, agree, divergence, cosine = sums
    if not images:
        raise DataError("there is no image to evaluate on")
    rates = [round(100 * hit / labelled, 4) if labelled else None for hit in hits]
    return Evaluation(
        images=int(images),
        labelled=int(labelled),
        top1=rates[0],
        top5=rates[1],
        dense_top1=rates[2],
        dense_top5=rates[3],
        agreement=round(100 * agree / images, 4) if classes else None,
        divergence=round(divergence / images, 6) if classes else None,
        cosine=round(cosine / images, 6),
    )
