"""The search as a call: `prune` gives masks, `search` also the tuned model and a report."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slimvit import macs, models
from slimvit.errors import UsageError
from slimvit.masks import SEMANTICS, Masks
from slimvit.search.algorithm1 import Found, Settings, run
from slimvit.search.budget import bisect, measure_speedup, uniform_counts
from slimvit.search.features import Features
from slimvit.search.reduce import rank
from slimvit.search.scores import SCORES, Score
from slimvit.search.state import State


@dataclass(frozen=True)
class LayerReport:
    """One block of the report: its number, tokens kept, relative error, steps and seconds."""

    layer: int
    kept: int
    error: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
        masks: the kept sets.
        model: the dense model with the fine-tuned blocks, or None without block fine-tuning.
        report: one entry a block, first block first.
        cut: fraction of the dense model's MACs that the masks save.
    """

    masks: Masks
    model: nn.Module | None
    report: tuple[LayerReport, ...]
    cut: float


def prune(model: nn.Module, loader: Iterable, **options: object) -> Masks:
    """Search for masks by Algorithm 1; `search` without the report. See there for the options."""
    return search(model, loader, **options).masks  # type: ignore[arg-type]


def search(
    model: nn.Module,
    loader: Iterable,
    *,
    tolerance: float | None = None,
    cut: float | None = None,
    speedup: float | None = None,
    counts: Sequence[int] | None = None,
    uniform: bool = False,
    score: str | Score = "eq6",
    granularity: int = 10,
    epochs: int = 0,
    lr: float = 1e-4,
    semantics: str = "drop",
    seed: int = 0,
    cache_bytes: int = 1 << 30,
    cache_dir: str | None = None,
    state: str | os.PathLike[str] | None = None,
    restart: bool = False,
    progress: bool = True,
) -> Result:
    """Find, block by block from the top, the tokens that matter.

    Block t starts from S_{t+1} and takes in the `granularity` best scored tokens at a time until
    the relative error of block t+1 is within the tolerance; the last step is then bisected, so
    that a coarse granularity costs no tokens. Exactly one budget is given:
    `tolerance`, `cut`, `speedup` or `counts`. `cut` and `speedup` are met by trying tolerances
    without fine-tuning; block fine-tuning then runs once with the counts found.

    Under torch.distributed each process passes its own share of the batches and all get the
    same result.

    Args:
        model: a dense timm VisionTransformer; it is not changed.
        loader: batches of images [b, C, H, W], or tuples that begin with them; labels are not
            needed.
        tolerance: largest relative error, > 0. 0.02 cuts about 45 % of a DeiT.
        cut: fraction of the dense MACs to save at least, in (0, 1).
        speedup: images per second over the dense model's to reach, > 1, measured on the model's
            device with the loader's batch size.
        counts: kept counts n_1 … n_L, prefix tokens included; the scores choose which tokens.
        uniform: with `cut`, keep equally many tokens in every block instead of searching.
        score: "eq6", "attention", "random", or a function of a LayerView.
        granularity: tokens added per step, ≥ 1.
        epochs: of block fine-tuning per step; 0 leaves the weights alone.
        lr: learning rate of block fine-tuning.
        semantics: "drop", "zero" or "idle".
        seed: of shuffling and of the random score.
        cache_bytes: memory for the images' features; beyond it they go to a temporary folder.
        cache_dir: where that folder is made.
        state: file that lets a killed search go on; removed at the end.
        restart: begin anew even if `state` exists.
        progress: show progress on stderr (rank 0 only).

    Returns:
        Masks, fine-tuned model and report.

    Raises:
        UsageError: an option is out of range, or not exactly one budget is given.
        UnsupportedModelError: the model cannot be slimmed.
        SlimvitError: features are not finite, or the budget is out of reach.

    Source: Patch Slimming (Tang et al., CVPR 2022), Algorithm 1.
    """
    spec = models.spec(model)
    _check_budget(tolerance, cut, speedup, counts, uniform, spec)
    _check_options(score, granularity, epochs, lr, semantics, cache_bytes)
    dense = copy.deepcopy(model).eval().requires_grad_(False)
    settings = Settings(
        score=SCORES[score] if isinstance(score, str) else score,
        tolerance=tolerance,
        counts=tuple(counts) if counts is not None else None,
        granularity=granularity,
        epochs=epochs,
        lr=lr,
        semantics=semantics,
        seed=seed,
    )
    if uniform and cut is not None:
        settings = replace(settings, counts=uniform_counts(spec, cut))
    progress = progress and rank() == 0
    first = _FirstBatch(loader)
    features = Features(
        dense, first, cache_bytes=cache_bytes, directory=cache_dir, progress=progress
    )
    try:
        identity = _identity(dense, features, settings, cut=cut, speedup=speedup)
        session = _Session(dense, features, spec, State(state, identity, restart), progress)
        if settings.tolerance is None and settings.counts is None:
            found = session.to_budget(settings, cut, speedup, first.images)
        else:
            found = session.once("search", settings)
    finally:
        features.close()
    session.state.remove()
    return session.result(found, settings)


class _Session:
    """One search: its passes over the blocks and what they share."""

    def __init__(
        self, dense: nn.Module, features: Features, spec: models.Spec, state: State, progress: bool
    ) -> None:
        self.dense, self.features, self.spec, self.state = dense, features, spec, state
        self.progress = progress

    def once(self, name: str, settings: Settings) -> list[Found]:
        """One pass from the last block to the first."""
        done = list(self.state.done(name))
        found = []
        blocks = run(self.dense, self.features, settings, done, lambda f: self.state.add(name, f))
        bar = tqdm(
            blocks, desc=name, total=self.spec.depth, unit="block", disable=not self.progress
        )
        for block in bar:
            found.append(block)
            bar.set_postfix(
                block=block.layer, kept=int(block.keep.sum()), error=f"{block.error:.4f}"
            )
        return found

    def to_budget(
        self, settings: Settings, cut: float | None, speedup: float | None, images: Tensor
    ) -> list[Found]:
        """Passes at several tolerances, then one with block fine-tuning if it is wanted."""
        passes: dict[tuple[int, ...], list[Found]] = {}

        def at(tolerance: float) -> Masks:
            trial = replace(settings, tolerance=tolerance, epochs=0)
            found = self.once(f"tolerance {tolerance:.3g}", trial)
            masks = self.masks(found, trial)
            passes[masks.counts] = found
            return masks

        def reached(masks: Masks) -> bool:
            if cut is not None:
                return macs.cut(self.spec, masks) >= cut
            name = f"speedup of {masks.counts}"
            if name not in self.state.notes:
                self.state.note(name, measure_speedup(self.dense, masks, images))
            return speedup is not None and self.state.notes[name] >= speedup

        wanted = f"cut {cut}" if cut is not None else f"speed-up {speedup}"
        best = bisect(at, reached, wanted)
        if settings.epochs == 0:
            return passes[best.counts]
        return self.once("fine-tuning", replace(settings, counts=best.counts))

    def masks(self, found: list[Found], settings: Settings) -> Masks:
        """The masks of a finished pass."""
        found = sorted(found, key=lambda f: f.layer)
        return Masks(
            keep=torch.stack([f.keep for f in found]),
            prefix=self.spec.prefix,
            grid=self.spec.grid,
            semantics=settings.semantics,
            model=self.spec.name,
            image_size=self.spec.image_size,
            tolerance=settings.tolerance,
            scores=torch.stack([f.scores for f in found]),
            errors=torch.tensor([f.error for f in found]),
            data=self.features.fingerprint,
        )

    def result(self, found: list[Found], settings: Settings) -> Result:
        """Everything that a search returns."""
        masks = self.masks(found, settings)
        model = None
        if settings.epochs:
            model = copy.deepcopy(self.dense).requires_grad_(True)
            for f in found:
                if f.weights:
                    models.block_module(model, f.layer).load_state_dict(f.weights)
        report = [
            LayerReport(f.layer, int(f.keep.sum()), f.error, f.steps, f.seconds) for f in found
        ]
        report.sort(key=lambda entry: entry.layer)
        return Result(masks, model, tuple(report), macs.cut(self.spec, masks))


class _FirstBatch:
    """Iterates over a loader and remembers the first batch of images."""

    def __init__(self, loader: Iterable) -> None:
        self._loader = loader
        self.images: Tensor

    def __iter__(self):
        for number, batch in enumerate(self._loader):
            if number == 0:
                self.images = batch if isinstance(batch, Tensor) else batch[0]
            yield batch


def _identity(
    dense: nn.Module, features: Features, settings: Settings, **budget: object
) -> dict[str, str]:
    """What makes two searches the same one, by name."""
    weights = hashlib.blake2b(digest_size=8)
    for name, value in dense.state_dict().items():
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    values = asdict(replace(settings, score=None)) | budget
    values["score"] = settings.score.__name__
    named = {name: json.dumps(value) for name, value in values.items()}
    return named | {
        "model": models.spec(dense).name,
        "weights": weights.hexdigest(),
        "calibration images": features.fingerprint,
    }


def _check_budget(
    tolerance: float | None,
    cut: float | None,
    speedup: float | None,
    counts: Sequence[int] | None,
    uniform: bool,
    spec: models.Spec,
) -> None:
    given = {"tolerance": tolerance, "cut": cut, "speedup": speedup, "counts": counts}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        got = " and ".join(names) or "none"
        raise UsageError(f"give exactly one of tolerance, cut, speedup and counts, got {got}")
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance > 0):
        raise UsageError(f"tolerance must be finite and above 0, got {tolerance}")
    if cut is not None and not 0 < cut < 1:
        raise UsageError(f"cut must lie between 0 and 1, got {cut}")
    if speedup is not None and not (math.isfinite(speedup) and speedup > 1):
        raise UsageError(f"speedup must be finite and above 1, got {speedup}")
    if uniform and cut is None:
        raise UsageError("uniform needs a cut: with counts give equal ones")
    if counts is not None:
        masks = Masks.from_counts(counts, spec.grid, spec.prefix)
        models.check_masks(masks, spec)


def _check_options(
    score: str | Score, granularity: int, epochs: int, lr: float, semantics: str, cache_bytes: int
) -> None:
    if isinstance(score, str) and score not in SCORES:
        raise UsageError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    if granularity < 1:
        raise UsageError(f"granularity must be at least 1 token, got {granularity}")
    if epochs < 0:
        raise UsageError(f"epochs must be at least 0, got {epochs}")
    if not (math.isfinite(lr) and lr > 0):
        raise UsageError(f"lr must be finite and above 0, got {lr}")
    if semantics not in SEMANTICS:
        raise UsageError(f"semantics must be one of {', '.join(SEMANTICS)}, got {semantics!r}")
    if cache_bytes < 0:
        raise UsageError(f"cache_bytes must be at least 0, got {cache_bytes}")
