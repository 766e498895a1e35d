"""The demo from trained weights to images per second; each number is measured on the spot."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from tqdm import tqdm

from slimvit import backends, models
from slimvit.bench import Report, bench
from slimvit.checks import dtype_name
from slimvit.demo import _digits, _dynamic, _model
from slimvit.evaluate import Evaluation, evaluate
from slimvit.finetune import choose_amp, finetune
from slimvit.macs import cut
from slimvit.masks import Masks
from slimvit.models import Spec
from slimvit.runtime import PRECISIONS, accelerate, apply_masks
from slimvit.search import Result, search

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What the demo does, and how much of it.

    Attributes:
        tolerance: of Algorithm 1: largest relative error of a block.
        calibration: training digits that the search looks at.
        granularity: tokens a step of the search.
        block_epochs: epochs of block fine-tuning a step.
        epochs: of fine-tuning the whole model; 0 leaves it out.
        dynamic_epochs: of training SPViT and of fine-tuning to DPS; 0 leaves both out.
        training: digits to fine-tune on; None for all 1347.
        held_out: held-out digits to validate on; None for all 450.
        compare: timm model with random weights that is timed as well, slimmed by the same cut.
        batch: images a call when timing.
        precision: "float32", "bfloat16" or "float16"; None for bfloat16 where the machine has it.
        backend: slimvit's back end.
        against: other runtimes to time; None for all that work here.
        rounds: of timing.
        seconds: a row's turn in a round.
        device: where everything runs.
        seed: of the training digits' rendering and of the random weights.
    """

    tolerance: float = 0.0015
    calibration: int = 128
    granularity: int = 16
    block_epochs: int = 3
    epochs: int = 3
    dynamic_epochs: int = 1
    training: int | None = None
    held_out: int | None = None
    compare: str = "deit_tiny_patch16_224"
    batch: int = 8
    precision: str | None = None
    backend: str = "auto"
    against: tuple[str, ...] | None = None
    rounds: int = 3
    seconds: float = 0.5
    device: torch.device = torch.device("cpu")
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """Everything that the demo found.

    Attributes:
        settings: as asked for, with the precision that was chosen.
        search: the digits model's masks, tuned blocks and report.
        pruned: held-out accuracy before the whole is fine-tuned, in float32.
        final: held-out accuracy of the accelerated model that is timed.
        ways: the ways of choosing patches at the same cut: dense, the masks, SPViT, DPS; empty
            where they are left out.
        digits: timing of the digits model.
        compare: timing of the other model.
        shapes: of both models.
        compare_masks: of the other model.
        seconds: by stage.
        picture: a held-out digit, [3, 48, 48] in [0, 1].
    """

    settings: Settings
    search: Result
    pruned: Evaluation
    final: Evaluation
    ways: list[_dynamic.Way]
    digits: Report
    compare: Report
    shapes: tuple[Spec, Spec]
    compare_masks: Masks
    seconds: dict[str, float]
    picture: torch.Tensor

    @property
    def masks(self) -> Masks:
        """The digits model's."""
        return self.search.masks


def run(settings: Settings, say: Say = print, progress: bool = True) -> Outcome:
    """Prune, fine-tune, validate and time the digits model; time the other at the same cut.

    Args:
        settings: how much of it.
        say: takes one line for each stage.
        progress: show progress bars on stderr within the stages.

    Raises:
        SlimvitError: scikit-learn is missing, the back end cannot run here, or a setting is out of
            range.
    """
    settings = replace(settings, precision=settings.precision or _fast_precision(settings.device))
    backends.choose(settings.backend, settings.device, PRECISIONS[settings.precision])  # or raise
    clock = _Clock(say)
    train, held_out = _digits.load_splits()
    train, held_out = train.first(settings.training), held_out.first(settings.held_out)
    validation = _digits.held_out_batches(held_out)
    dense = _model.load().to(settings.device)
    shape = models.spec(dense)
    say(
        f"digits ViT: {shape.depth} blocks, {shape.tokens} tokens of width {shape.width}; "
        f"{len(train.labels)} digits to train on, {len(held_out.labels)} held out"
    )
    words = f"Algorithm 1 with block fine-tuning, tolerance {settings.tolerance}"
    with clock("prune", f"[1/6] {words}") as note:
        found = _search(dense, train, settings, progress)
        kept = ", ".join(map(str, found.masks.counts))
        note(f"kept {kept}: {100 * found.cut:.1f} % fewer MACs")
    with clock("finetune", f"[2/6] fine-tuning the whole, {settings.epochs} epochs"):
        slim = apply_masks(found.model or dense, found.masks).eval()
        pruned = evaluate(dense, slim, validation)
        tuned = _finetune(slim, dense, train, settings, progress)
    with clock(
        "validate", f"[3/6] validating the accelerated model in {settings.precision}"
    ) as note:
        fast = accelerate(
            tuned, found.masks, backend=settings.backend, precision=settings.precision
        )
        final = evaluate(dense, fast, validation)
        note(f"held-out top-1 {final.dense_top1:.1f} % dense, {final.top1:.1f} % slim")
    words = f"[4/6] patches of each image's own: SPViT and DPS, {settings.dynamic_epochs} epochs"
    with clock("dynamic", words) as note:
        ways = _ways(tuned, dense, found.masks, train, validation, settings, progress)
        note(", ".join(f"{way.name} {way.final.top1:.1f} %" for way in ways if way.final))
    with clock("bench", "[5/6] timing the digits ViT"), _status(progress):
        digits = _bench(tuned, found.masks, settings)
    words = f"timing {settings.compare}, random weights, same cut"
    with clock("bench_compare", f"[6/6] {words}"), _status(progress):
        torch.manual_seed(settings.seed)
        other = models.create(settings.compare).to(settings.device)
        other_shape = models.spec(other)
        other_masks = same_cut(other_shape, found.masks, found.cut)
        compare = _bench(other, other_masks, settings)
    return Outcome(
        settings=settings,
        search=found,
        pruned=pruned,
        final=final,
        ways=ways,
        digits=digits,
        compare=compare,
        shapes=(shape, other_shape),
        compare_masks=other_masks,
        seconds=clock.seconds,
        picture=validation[0][0][0] * _digits.STD + _digits.MEAN,
    )


def _search(dense: nn.Module, train: _digits.Split, settings: Settings, progress: bool) -> Result:
    return search(
        dense,
        _digits.Batches(train.first(settings.calibration), 32, seed=settings.seed),
        tolerance=settings.tolerance,
        epochs=settings.block_epochs,
        granularity=settings.granularity,
        progress=progress,
    )


def _finetune(
    slim: nn.Module, dense: nn.Module, train: _digits.Split, settings: Settings, progress: bool
) -> nn.Module:
    """The dense model with the weights that the slim one learned."""
    batches = _digits.Batches(train, 32, seed=settings.seed + 1, training=True)
    result = finetune(
        slim, dense, batches, epochs=settings.epochs, alpha=0.5, lr=1e-4, progress=progress
    )
    tuned = copy.deepcopy(dense)
    tuned.load_state_dict(result.model.state_dict())
    return tuned


def _ways(
    tuned: nn.Module,
    dense: nn.Module,
    masks: Masks,
    train: _digits.Split,
    validation: list[tuple[torch.Tensor, torch.Tensor]],
    settings: Settings,
    progress: bool,
) -> list[_dynamic.Way]:
    if not settings.dynamic_epochs:
        return []
    shape = models.spec(dense)
    options = {"epochs": settings.dynamic_epochs, "progress": progress}
    plan = _dynamic.same_share(shape, cut(shape, masks))
    chosen = {
        "for all images (Algorithm 1)": (tuned, masks),
        "for each image (SPViT)": _dynamic.train_spvit(dense, plan, train, **options),
        "for each image (DPS)": _dynamic.train_dps(tuned, masks, train, **options),
    }
    return _dynamic.compare(
        dense,
        chosen,
        validation,
        batch=settings.batch,
        backend=settings.backend,
        precision=settings.precision,
        rounds=settings.rounds,
        seconds=settings.seconds,
    )


def _bench(model: nn.Module, masks: Masks, settings: Settings) -> Report:
    return bench(
        model,
        masks,
        batch=settings.batch,
        precision=settings.precision or "float32",
        backend=settings.backend,
        against=settings.against,
        rounds=settings.rounds,
        seconds=settings.seconds,
    )


def same_cut(spec: Spec, masks: Masks, wanted: float) -> Masks:
    """Masks for another model with the same profile over the depth and the same share of MACs cut.

    Args:
        spec: the other model's shape.
        masks: whose share of kept patches, block for block, is stretched to the other depth.
        wanted: fraction of the dense MACs to save.
    """
    patches = masks.grid[0] * masks.grid[1]
    profile = torch.tensor([count - masks.prefix for count in masks.counts[:-1]]) / patches
    shares = nn.functional.interpolate(
        profile[None, None], size=spec.depth - 1, mode="linear", align_corners=True
    )[0, 0]

    def scaled(factor: float) -> Masks:
        kept = (shares * factor * spec.patches).round().long().clamp(0, spec.patches)
        counts = [*(spec.prefix + kept).tolist(), spec.head_tokens]
        return Masks.from_counts(
            counts, spec.grid, spec.prefix, model=spec.name, image_size=spec.image_size
        )

    low, high = 0.0, 1 / max(shares.min().item(), 1e-3)  # at `high` every patch is kept
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if cut(spec, scaled(middle)) > wanted else (low, middle)
    return min(scaled(low), scaled(high), key=lambda m: abs(cut(spec, m) - wanted))


class _Clock:
    """Tells each stage, how long it took, and what came of it."""

    def __init__(self, say: Say) -> None:
        self.seconds: dict[str, float] = {}
        self._say = say

    @contextlib.contextmanager
    def __call__(self, stage: str, words: str) -> Iterator[Say]:
        start = time.perf_counter()
        self._say(f"{words} …")
        notes: list[str] = []
        yield notes.append
        self.seconds[stage] = time.perf_counter() - start
        self._say("; ".join([f"      {self.seconds[stage]:.0f} s", *notes]))


@contextlib.contextmanager
def _status(progress: bool) -> Iterator[None]:
    """What the bench is preparing, on one line of stderr: some rows take a while to compile."""
    log = logging.getLogger("slimvit")
    level, propagate = log.level, log.propagate
    line = tqdm(bar_format="      {desc}", leave=False, disable=None if progress else True)
    handler = logging.Handler()
    handler.emit = lambda record: line.set_description_str(record.getMessage())  # type: ignore
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
        line.close()


def _fast_precision(device: torch.device) -> str:
    return dtype_name(choose_amp("auto", device) or torch.float32)
