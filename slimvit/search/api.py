"""The search as a call: `prune` gives masks, `search` also the tuned model and a report."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slimvit import macs, models
from slimvit.errors import SearchError, UsageError
from slimvit.masks import Masks
from slimvit.search import identity
from slimvit.search.algorithm1 import Found, Settings, run
from slimvit.search.budget import bisect, measure_speedup, uniform_counts
from slimvit.search.features import Features, Peeked
from slimvit.search.options import Budget, options_of, read_budget, read_settings
from slimvit.search.reduce import rank
from slimvit.search.scores import Score
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


@models.own_precision()
def search(
    model: nn.Module,
    loader: Iterable[Any],
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
    keep_state: bool = False,
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
    same result. All is computed in the model's precision, autocast or not.

    Args:
        model: a dense timm VisionTransformer; it is not changed.
        loader: batches of images [b, C, H, W], or tuples that begin with them; labels are not
            needed.
        tolerance: largest relative error, > 0. 0.02 cuts about 45 % of a DeiT.
        cut: fraction of the dense MACs to save at least, in (0, 1).
        speedup: images per second over the dense model's to reach, > 1, measured on the model's
            device with the loader's batch size.
        counts: kept counts n_1 … n_L, prefix tokens included, n_L what the head reads; the scores
            choose which tokens.
        uniform: with `cut`, keep equally many tokens in every block instead of searching.
        score: "eq6", "attention", "random", or a function of a LayerView.
        granularity: tokens added per step, ≥ 1.
        epochs: of block fine-tuning per step; 0 leaves the weights alone.
        lr: learning rate of block fine-tuning.
        semantics: "drop", "zero" or "idle".
        seed: of shuffling and of the random score.
        cache_bytes: memory for the images' features; beyond it they go to a temporary folder.
        cache_dir: where that folder is made.
        state: file that lets a killed search go on; removed at the end, and where the search
            cannot end. It needs a score of a name, not a lambda or a partial, and is of another
            search once that score's file is edited.
        keep_state: leave `state` at the end, for callers that save the result first and remove it
            then: until they have, the same call ends soon.
        restart: begin anew even if `state` exists.
        progress: show progress on stderr (rank 0 only).

    Returns:
        Masks, fine-tuned model and report.

    Raises:
        UsageError: an option is out of range, not exactly one budget is given, `epochs` are wanted
            in torch.inference_mode, or a batch is neither images nor a tuple that begins with them.
        UnsupportedModelError: the model cannot be slimmed.
        SearchError: the budget is out of reach, or scores, errors or losses are not finite.
        SlimvitError: images are integers, features not finite, or `state` is of another search.

    Source: Patch Slimming (Tang et al., CVPR 2022), Algorithm 1.
    """
    spec = models.spec(model)
    budget = read_budget(
        spec, tolerance=tolerance, cut=cut, speedup=speedup, counts=counts, uniform=uniform
    )
    settings = read_settings(
        budget,
        score=score,
        granularity=granularity,
        epochs=epochs,
        lr=lr,
        semantics=semantics,
        seed=seed,
    )
    if settings.epochs > 0:
        models.refuse_inference_mode("a search with epochs")
    if settings.epochs > 0 and next(model.parameters()).dtype == torch.float16:
        raise UsageError("block fine-tuning needs a float32 or bfloat16 model, got float16")
    if uniform:
        settings = replace(settings, counts=uniform_counts(spec, budget.cut, semantics))
    dense = models.copied(model).eval().requires_grad_(False)
    known = {} if state is None else identity.of_settings(dense, settings, budget, score)
    saved = State(state, known, restart)
    progress = progress and rank() == 0
    images = Peeked(loader)
    features = Features(
        dense, images, cache_bytes=cache_bytes, directory=cache_dir, progress=progress
    )
    try:
        saved.check(identity.of_images(features, settings, budget))
        session = _Session(dense, features, spec, saved, progress)
        found = session.search(settings, budget, images.first)
        result = session.result(found, settings)
    except SearchError:
        saved.remove()
        raise
    finally:
        features.close()
    if not keep_state:
        saved.remove()
    return result


@options_of(search)
def prune(*args: Any, **options: Any) -> Masks:
    """Search for masks by Algorithm 1; `search` without the report. See there for the options."""
    return search(*args, **options).masks


class _Session:
    """One search: its passes over the blocks and what they share."""

    def __init__(
        self, dense: nn.Module, features: Features, spec: models.Spec, state: State, progress: bool
    ) -> None:
        self.dense, self.features, self.spec, self.state = dense, features, spec, state
        self.progress = progress

    def search(self, settings: Settings, budget: Budget, images: Tensor | None) -> list[Found]:
        """All passes; `images` are a batch to measure a speed-up with, if there is any here."""
        if settings.tolerance is None and settings.counts is None:
            return self.to_budget(settings, budget, images)
        return self.once("search", settings)

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

    def to_budget(self, settings: Settings, budget: Budget, images: Tensor | None) -> list[Found]:
        """Passes at several tolerances, then one with block fine-tuning if it is wanted."""
        passes: dict[tuple[int, ...], list[Found]] = {}

        def at(tolerance: float) -> Masks:
            trial = replace(settings, tolerance=tolerance, epochs=0)
            found = self.once(f"tolerance {tolerance:.3g}", trial)
            masks = self.masks(found, trial)
            passes[masks.counts] = found
            return masks

        def reached(masks: Masks) -> bool:
            if budget.cut is not None:
                return macs.cut(self.spec, masks) >= budget.cut
            name = f"speedup of {masks.counts}"
            if name not in self.state.notes:
                self.state.note(name, measure_speedup(self.dense, masks, images))
            return self.state.notes[name] >= budget.speedup

        best = bisect(at, reached, budget.wanted)
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
