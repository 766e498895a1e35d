"""Training of DPS: a predictor in each block learns how the score ranks an image's tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slimvit import models
from slimvit.checks import number, whole, wholes
from slimvit.dynamic import DPS
from slimvit.dynamic.dps import Predictor
from slimvit.dynamic.seeded import seeded
from slimvit.errors import MasksError, SlimvitError
from slimvit.masks import Masks
from slimvit.models import Spec
from slimvit.search.features import Features, images_of
from slimvit.search.image_scores import block_scores
from slimvit.search.options import options_of, read_score, read_seed
from slimvit.search.reduce import ExactMean, own_batches, rank
from slimvit.search.scores import SCORES, Score
from slimvit.search.spread import spread_pattern
from slimvit.search.tune import share_gradients

EPOCHS = 40
SPREAD = 1.0
_TINY = 1e-20  # of an image's total score: what the logarithm of a score of zero is taken of


@dataclass(frozen=True)
class PredictorReport:
    """One block of the report.

    Attributes:
        layer: t, counted from 1.
        alive, kept: tokens that it receives and keeps.
        loss: mean squared error in the last epoch; 1 is that of no knowledge.
        correlation: Spearman's, of the predicted and the true scores of the patches, averaged
            over the training images.
    """

    layer: int
    alive: int
    kept: int
    loss: float
    correlation: float


class _Settings(NamedTuple):
    epochs: int
    lr: float
    spread: float
    seed: int
    views: int


@models.own_precision()
def fit_dps(
    model: nn.Module,
    loader: Iterable[Any],
    masks: Masks | Sequence[int],
    *,
    score: str | Score = "eq6",
    epochs: int = EPOCHS,
    lr: float = 1e-2,
    spread: float = SPREAD,
    hidden: int | None = None,
    flip: bool = True,
    seed: int = 0,
    cache_bytes: int = 1 << 30,
    cache_dir: str | None = None,
    progress: bool = True,
) -> tuple[DPS, tuple[PredictorReport, ...]]:
    """A `DPS` with the masks' counts, its predictors fitted to each image's own scores.

    From the last block to the first, block t's score of every token of every image is computed
    with that image's own nested kept sets above, and a predictor learns it from Z_{t-1} of the
    dense model. Only ranks within an image count, so that its target is

        (log s_i − mean log s) / std log s + spread · pattern_i     over the patches of the image

    again standardised, and the loss is the mean squared error after the predictions of an image
    are centred. The pattern is blue noise over the grid, which predictors can tell from the
    position embedding in their input: by it kept patches thin out where scores are low, instead
    of ending at an edge. The model itself is not trained. Under torch.distributed each process
    passes its own share of the batches and all get the same plan.

    Args:
        model: a dense timm VisionTransformer; it is not changed.
        loader: batches of images [b, C, H, W], or tuples that begin with them; labels are not
            needed. Read once.
        masks: static masks, or the counts n_1 … n_L.
        score: "eq6", "attention", or a function of a LayerView.
        epochs: over the images, for each predictor.
        lr: highest learning rate; it rises and falls once.
        spread: weight of the pattern; 0 keeps the highest scores alone.
        hidden: channels inside the predictors; None for D / 4 rounded to a multiple of 16.
        flip: learn from the mirrored images too.
        seed: of the predictors' weights and of shuffling.
        cache_bytes: memory for the images' features; beyond it they go to a temporary folder.
        cache_dir: where that folder is made.
        progress: show progress on stderr (rank 0 only).

    Returns:
        The plan, bound to the model, and a report with one entry for each block that chooses,
        first block first.

    Raises:
        MasksError, PlanError: the masks or counts are wrong or do not fit the model.
        UsageError: an option is out of range, or torch.inference_mode is on.
        UnsupportedModelError: the model cannot be slimmed.
        DataError: the loader has no images.
        SlimvitError: features or the loss are not finite.

    Source: Patch Slimming (Tang et al., CVPR 2022), section 4.4.
    """
    models.refuse_inference_mode("fit_dps")
    spec = models.spec(model)
    settings = _Settings(
        epochs=whole("epochs", epochs, 1),
        lr=number("lr", lr, above=0),
        spread=number("spread", spread, least=0),
        seed=read_seed(seed),
        views=2 if flip else 1,
    )
    score = read_score(score, (name for name in SCORES if name != "random"))
    plan = DPS(_counts(masks, spec), hidden=hidden).bind(spec)
    dense = models.copied(model).eval().requires_grad_(False)
    progress = progress and rank() == 0
    images = _mirrored(loader) if flip else loader
    features = Features(
        dense, images, cache_bytes=cache_bytes, directory=cache_dir, progress=progress
    )
    try:
        reports = list(_blocks(dense, features, plan, score, settings, progress))
    finally:
        features.close()
    return plan.requires_grad_(True), tuple(reversed(reports))


@options_of(fit_dps)
def train_dps(*args: Any, **options: Any) -> DPS:
    """Train a `DPS`; `fit_dps` without the report. See there for the options."""
    return fit_dps(*args, **options)[0]


def _blocks(
    dense: nn.Module,
    features: Features,
    plan: DPS,
    score: Score,
    settings: _Settings,
    progress: bool,
) -> Iterator[PredictorReport]:
    """Score and fit the blocks L - 1 … 1."""
    plan.to(next(dense.parameters()).device).float()
    spec, pattern = plan.spec, settings.spread * spread_pattern(plan.grid)
    scored = block_scores(dense, features, spec, plan.counts, score, settings.seed)
    bar = tqdm(scored, desc="predictors", total=spec.depth - 1, unit="block", disable=not progress)
    for index, scores in bar:
        if index - 1 not in plan.pruning:
            continue
        targets = [values[:, spec.prefix :].cpu() for values in scores]
        trainer = _Trainer(plan.predictors[str(index - 1)], features, index, spec, settings)
        wanted = [_standardised(t.float().clamp(min=_TINY).log()) + pattern for t in targets]
        loss = trainer.fit([_standardised(t) for t in wanted])
        found = trainer.correlation(targets)
        bar.set_postfix(block=index, loss=f"{loss:.3f}", correlation=f"{found:.2f}")
        yield PredictorReport(index, plan.alive[index - 1], plan.counts[index - 1], loss, found)


class _Trainer:
    """AdamW on one predictor; batches are shuffled alike in all processes."""

    def __init__(
        self,
        predictor: Predictor,
        features: Features,
        index: int,
        spec: Spec,
        settings: _Settings,
    ) -> None:
        self._predictor, self._features, self._index = predictor, features, index
        self._prefix, self._settings = spec.prefix, settings
        seed = settings.seed * 1009 + index
        self._generator = torch.Generator().manual_seed(seed)
        with seeded(seed):
            fresh = Predictor(spec.width, predictor.down.out_features)  # alike on every device
        predictor.load_state_dict(fresh.state_dict())
        nn.init.zeros_(predictor.score.bias)  # the same for all tokens: nothing to learn

    def scores(self, batch: int) -> Tensor:
        """Predicted scores of the patches, [b, N - prefix]."""
        inputs = self._features.at(self._index - 1, batch).float()
        return self._predictor(inputs)[:, self._prefix :]

    def fit(self, targets: list[Tensor]) -> float:
        """Train; the mean loss of the last epoch."""
        epochs, lr = self._settings.epochs, self._settings.lr
        own = self._own(len(targets))
        bias = self._predictor.score.bias
        parameters = [p for p in self._predictor.parameters() if p is not bias]
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, lr, total_steps=max(2, epochs * len(own))
        )
        mean = ExactMean(1)
        for epoch in range(epochs):
            for turn in torch.randperm(len(own), generator=self._generator).tolist():
                optimizer.zero_grad(set_to_none=True)
                batch = own[turn]
                if batch is not None:
                    with torch.enable_grad():
                        losses = self._losses(batch, targets[batch])
                        losses.mean().backward()
                    if epoch == epochs - 1:
                        mean.add(losses.detach()[:, None])
                share_gradients(parameters)
                optimizer.step()
                schedule.step()
        return float(mean.mean())

    def _own(self, count: int) -> list[int | None]:
        """As `own_batches`, of whole batches of the loader, each with its mirror image."""
        views = self._settings.views
        whole = own_batches(count // views)
        return [None if b is None else b * views + v for b in whole for v in range(views)]

    def _losses(self, batch: int, target: Tensor) -> Tensor:
        """Mean squared error of each image, [b]."""
        scores = self.scores(batch)
        centred = scores - scores.mean(1, keepdim=True)
        losses = (centred - target.to(scores.device)).square().mean(1)
        if not losses.isfinite().all():
            raise SlimvitError(
                f"training of the predictor of block {self._index} diverged: the loss is "
                f"{float(losses.detach().mean())}, lower the learning rate"
            )
        return losses

    @torch.no_grad()
    def correlation(self, targets: list[Tensor]) -> float:
        """Spearman's rank correlation, averaged over all images of all processes."""
        mean = ExactMean(1)
        for batch, target in enumerate(targets):
            mean.add(spearman(self.scores(batch).cpu(), target)[:, None])
        return float(mean.mean())


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of each row of a and b [B, n]: [B], float64."""
    ranks = [t.argsort(1).argsort(1).double() for t in (a, b)]
    a, b = (r - r.mean(1, keepdim=True) for r in ranks)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1)


def _standardised(values: Tensor) -> Tensor:
    """[b, n], of mean 0 and standard deviation 1 in each image."""
    values = values - values.mean(1, keepdim=True)
    return (values / values.std(1, keepdim=True, correction=0).clamp(min=1e-6)).float()


def _mirrored(loader: Iterable[Any]) -> Iterator[Tensor]:
    """Every batch of images, then the same from left to right."""
    for images in images_of(loader):
        yield images
        yield images.flip(-1)


def _counts(masks: Masks | Sequence[int], spec: Spec) -> tuple[int, ...]:
    """The counts, once the masks are known to be of this model."""
    if not isinstance(masks, Masks):
        return wholes("counts", masks)
    models.check_masks(masks, spec)
    if masks.semantics != "drop":
        raise MasksError(f"DPS drops what it prunes: semantics must be drop, got {masks.semantics}")
    return masks.counts
