"""What the predictors of DPS learn, and everything that may be wrong with the input."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
from planners import TrueScores
from safetensors import safe_open
from safetensors.torch import save_file
from test_dps import CHOOSING, COUNTS, masks_of, smooth_images
from test_search_scores import every_path
from torch import Tensor, nn

from slimvit import DPS, apply_masks, load_plan
from slimvit.errors import DataError, MasksError, PlanError, SlimvitError, UsageError
from slimvit.masks import Masks
from slimvit.models import block_parts, spec
from slimvit.search import fit_dps, train_dps
from slimvit.search.features import Features
from slimvit.search.layer import score_batch
from slimvit.search.paths import last_moment, step_moment
from slimvit.search.predictors import _Trainer, spearman
from slimvit.search.scores import eq6
from slimvit.search.spread import spread_pattern


def test_scores_follow_each_image_own_kept_sets(tiny_vit):
    """The recursion with sets of each image's own, against all head paths."""
    torch.manual_seed(1)
    maps = [torch.rand(3, 2, 7, 7).double().softmax(-1) for _ in range(3)]
    kept = [torch.zeros(3, 1, dtype=torch.int64)]
    for n in (3, 5):
        rest = torch.stack([1 + torch.randperm(6)[: n - 1].sort().values for _ in range(3)])
        kept.append(torch.cat([torch.zeros(3, 1, dtype=torch.int64), rest], 1))
    moment = last_moment(3, 7, maps[0])
    for attention, index in zip(maps, kept, strict=True):
        moment = step_moment(moment, attention, index)
    for b in range(3):
        booleans = [torch.zeros(7, dtype=torch.bool).index_fill(0, k[b], True) for k in kept]
        expected = every_path([p[b : b + 1] for p in maps], booleans)
        got = moment.diagonal(dim1=1, dim2=2)[b : b + 1]
        torch.testing.assert_close(got, expected / expected.sum())


@torch.no_grad()
def true_scores(model: nn.Module, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What block t receives, [N, B, D], and its scores, [B, N], with no pruning above: t = 1 …"""
    features, parts = Features(model, [images], cache_bytes=1 << 24, progress=False), []
    every = torch.arange(17)
    for index in range(5, 0, -1):
        kept = every[:1] if index == 5 else every
        parts.append(
            score_batch(features, index, 0, block_parts(model), kept, eq6, tokens=17, seed=0)
        )
    return [features.at(t, 0) for t in range(5)], parts[::-1]


def test_training_finds_the_ranks_of_new_images(tiny_vit, monkeypatch):
    """Kept counts that prune nothing above, so that the true scores need no kept sets."""
    counts = (16, 16, 16, 16, 16, 1)
    before = copy.deepcopy(tiny_vit.state_dict())
    state = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", None)  # GPUs' generators are the caller's
    plan, report = fit_dps(
        tiny_vit, smooth_images(64).split(16), counts, epochs=15, spread=0, progress=False
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in tiny_vit.state_dict().items())
    assert [(r.layer, r.alive, r.kept) for r in report] == [(1, 17, 16)]
    assert report[0].loss < 0.9 and report[0].correlation > 0.3
    inputs, scores = true_scores(tiny_vit, smooth_images(40, seed=1))
    untrained = DPS(counts).bind(spec(tiny_vit))
    found = {}
    for name, of in (("trained", plan), ("untrained", untrained)):
        with torch.no_grad():
            predicted = of.predictors["0"](inputs[0])[:, 1:]
        found[name] = float(spearman(predicted, scores[0][:, 1:]).mean())
    assert found["trained"] > max(0.3, found["untrained"] + 0.1), found


@torch.no_grad()
def test_true_scores_keep_what_each_image_needs(tiny_vit):
    images = smooth_images(3)
    slim = apply_masks(tiny_vit, TrueScores(COUNTS))
    slim.plan.look(tiny_vit, images)
    kept, scores = slim.kept_sets(images), slim.plan.scores
    assert scores.shape == (5, 3, 17)
    torch.testing.assert_close(scores.sum(2), torch.ones(5, 3))
    for b in range(3):
        alive = set(range(17))
        for layer, n in enumerate(COUNTS[:-1]):
            best = sorted(alive - {0}, key=lambda i: -float(scores[layer, b, i]))[: n - 1]
            alive = {0, *best} if n < len(alive) else alive
            assert set(kept[layer][b].tolist()) == alive
    # One image alone has the same scores: nothing leaks from its neighbours.
    tiny_vit.blocks[2].train()
    modes = [module.training for module in tiny_vit.modules()]
    slim.plan.look(tiny_vit, images[1:2])
    assert modes == [module.training for module in tiny_vit.modules()]
    torch.testing.assert_close(slim.plan.scores[:, 0], scores[:, 1], rtol=1e-4, atol=1e-6)


def test_training_is_the_same_twice_and_only_then(tiny_vit):
    def weights(**options) -> Tensor:
        plan = train_dps(
            tiny_vit, smooth_images(6).split(4), COUNTS, epochs=2, progress=False, **options
        )
        return torch.cat([v.flatten() for v in plan.state_dict().values()])

    first = weights(seed=3)
    torch.manual_seed(99)
    assert torch.equal(weights(seed=3), first)
    assert torch.equal(weights(seed=3, cache_bytes=0), first)  # from disk
    assert not torch.equal(weights(seed=4), first)
    counts = torch.tensor(COUNTS)
    assert train_dps(tiny_vit, smooth_images(2).split(2), counts, epochs=1).counts == COUNTS
    assert not torch.equal(weights(seed=3, spread=0), first)
    assert not torch.equal(weights(seed=3, flip=False), first)


def process(rank: int, folder: str, model, batches) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    shares = {"even": batches[rank::2], "uneven": batches[:1] if rank else batches[1:]}
    for name, share in shares.items():
        plan = train_dps(model, share, COUNTS, epochs=2, progress=False)
        plan.save(f"{folder}/{name}-{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_two_processes_train_the_predictors_of_one(tiny_vit, tmp_path):
    batches = smooth_images(8).split(2)  # four: two each, or three and one
    torch.multiprocessing.spawn(process, (str(tmp_path), tiny_vit, batches), nprocs=2)
    for share, order in {"even": [0, 1, 2, 3], "uneven": [1, 0, 2, 3]}.items():
        one = [batches[number] for number in order]
        wanted = train_dps(tiny_vit, one, COUNTS, epochs=2, progress=False).state_dict()
        files = (tmp_path / f"{share}-{rank}.safetensors" for rank in (0, 1))
        first, second = (load_plan(file).state_dict() for file in files)
        for name, value in wanted.items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spread", [0, 0.7])
def test_targets_are_the_standardised_log_scores_and_the_pattern(tiny_vit, spread, monkeypatch):
    counts, seen = (16, 16, 16, 16, 16, 1), []

    def remember(self, targets):
        seen.append(targets)
        return 0.0

    monkeypatch.setattr("slimvit.search.predictors._Trainer.fit", remember)
    images = smooth_images(3)
    options = {"spread": spread, "flip": False, "progress": False}
    fit_dps(tiny_vit, [images], counts, **options)
    # Per-image sets above block 1 hold 16 of 17 tokens: rebuild them from the last block down.
    features = Features(tiny_vit, [images], cache_bytes=1 << 24, progress=False)
    kept = torch.zeros(3, 1, dtype=torch.int64)
    for index in range(5, 0, -1):
        s = score_batch(features, index, 0, block_parts(tiny_vit), kept, eq6, tokens=17, seed=0)
        if index == 5:
            kept = torch.cat([kept, 1 + s[:, 1:].topk(15).indices], 1).sort(1).values
    wanted = s[:, 1:].log()
    wanted = (wanted - wanted.mean(1, keepdim=True)) / wanted.std(1, keepdim=True, correction=0)
    wanted = wanted + spread * spread_pattern((4, 4))
    wanted = (wanted - wanted.mean(1, keepdim=True)) / wanted.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(seen[0][0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (14, 14), (7, 20)])
def test_pattern_spreads_what_is_kept(grid):
    pattern = spread_pattern(grid)
    count = grid[0] * grid[1]
    assert pattern.shape == (count,) and len(pattern.unique()) == count
    assert float(pattern.mean()) == pytest.approx(0, abs=1e-4)
    assert torch.equal(pattern, spread_pattern(grid))
    if count < 100:
        return
    # A third at random leaves 4/9 of neighbours on both sides of every kept patch; here far fewer.
    kept = torch.zeros(count, dtype=torch.bool)
    kept[pattern.topk(count // 3).indices] = True
    kept = kept.view(grid)
    beside = (kept & kept.roll(1, 0)).float().mean() + (kept & kept.roll(1, 1)).float().mean()
    assert float(beside) < 0.5 * 2 / 9


def test_what_does_not_fit_is_refused(tiny_vit, tmp_path):
    images = smooth_images(2)

    def refused(error, words, masks=COUNTS, loader=(images,), **options):
        with pytest.raises(error, match=words):
            fit_dps(tiny_vit, loader, masks, progress=False, **options)

    refused(MasksError, "model", dataclasses.replace(masks_of(tiny_vit), model="other_vit"))
    refused(MasksError, "semantics must be drop, got zero", masks_of(tiny_vit, semantics="zero"))
    refused(PlanError, "one for each of 6 blocks, got 2", (17, 1))
    refused(PlanError, "not grow", (9, 13, 13, 9, 6, 1))
    refused(DataError, "no calibration images", loader=())
    refused(SlimvitError, "floating point, got uint8", loader=(images.byte(),))
    refused(UsageError, "epochs must be at least 1, got 0", epochs=0)
    refused(UsageError, "epochs must be a whole number, got 1.5", epochs=1.5)
    refused(UsageError, "seed must be a whole number, got 0.5", seed=0.5)
    refused(UsageError, "seed must lie between .*, got 1180", seed=2**70)
    refused(UsageError, "cache_bytes must be at least 0, got -1", cache_bytes=-1)
    refused(UsageError, "cache_bytes must be a whole number, got '1'", cache_bytes="1")
    refused(UsageError, "cache_dir must be a folder .* got 'missing'", cache_dir="missing")
    refused(UsageError, "counts must be whole numbers in a list, got None", masks=None)
    refused(UsageError, "lr must be .* above 0, got nan", lr=float("nan"))
    refused(UsageError, "spread must be .* at least 0, got -1", spread=-1)
    refused(UsageError, "score must be one of .*, got 'random'", score="random")
    refused(PlanError, "hidden must be at least 1, got 0", hidden=0)
    refused(PlanError, "hidden must be a whole number, got 8.0", hidden=8.0)
    refused(SlimvitError, "diverged", lr=1e30, epochs=3, masks=COUNTS)
    plan = DPS(COUNTS).bind(spec(tiny_vit))
    other = timm.create_model("test_vit", img_size=96, num_classes=10)
    with pytest.raises(PlanError, match="17 tokens.*37 tokens"):
        apply_masks(other, plan)
    plan.save(tmp_path / "a.safetensors")
    tensors, metadata = parts_of(tmp_path / "a.safetensors")
    del tensors["predictors.1.down.weight"]
    save_file(tensors, tmp_path / "b.safetensors", metadata)
    with pytest.raises(PlanError, match=r"weights do not fit.*predictors\.1\.down\.weight"):
        load_plan(tmp_path / "b.safetensors")


def parts_of(path):
    """Tensors and metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_prune_dynamic_searches_first_or_takes_masks(prune, tiny_vit):
    flags = ("--dynamic", "--predictor-epochs", "2", "--json", "a.json")
    status, out, error = prune(*flags, "--tolerance", "0.3")
    assert status == 0, error
    assert "rank correlation" in out and "wrote plan.safetensors" in out
    masks = Masks.load("plan.masks.safetensors")
    first = load_plan("plan.safetensors")
    assert first.kind == "dps" and first.counts == masks.counts
    report = json.loads(Path("a.json").read_text())
    assert report["plan"] == "dps" and report["kept"] == list(masks.counts)
    assert [b["layer"] for b in report["blocks"]] == [t + 1 for t in first.pruning]
    assert report["cut"] == pytest.approx(1 - report["gmacs"] / report["dense_gmacs"])
    status, _, error = prune(*flags, "--masks", "plan.masks.safetensors")
    assert status == 0, error
    again = load_plan("plan.safetensors")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in first.state_dict().items())


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--masks", "m.safetensors"], "--masks needs --dynamic"),
        (["--spread", "1"], "--spread needs --dynamic"),
        (["--predictor-epochs", "1"], "--predictor-epochs needs --dynamic"),
        (["--dynamic", "--epochs", "1"], "--dynamic needs --epochs 0"),
        (["--dynamic", "--semantics", "zero"], "--dynamic needs --semantics drop, got zero"),
        (["--dynamic", "--score", "random"], "--score random"),
        (["--dynamic", "--masks", "m", "--cut", "0.4"], "not allowed with"),
        (["--dynamic", "--spread", "-1"], "--spread"),
        (["--dynamic", "--masks", "none.safetensors"], "none.safetensors"),
    ],
)
def test_prune_dynamic_refuses(prune, flags, words):
    status, _, error = prune(*flags)
    assert status != 0 and words in error and error.count("error: ") == 1
    assert not Path("plan.safetensors").exists()


def test_prune_dynamic_refuses_masks_of_other_semantics(prune, tiny_vit):
    masks_of(tiny_vit, semantics="zero").save("zero.safetensors")
    status, _, error = prune("--dynamic", "--masks", "zero.safetensors")
    assert status != 0 and "semantics drop, got zero" in error


def test_the_loss_is_that_of_the_last_epoch(tiny_vit, monkeypatch):
    losses, counts = [], (16, 16, 16, 16, 16, 1)  # one block chooses

    def remembered(self, *given):
        losses.append(found := compute(self, *given))
        return found

    compute = _Trainer._losses
    monkeypatch.setattr(_Trainer, "_losses", remembered)
    batches = smooth_images(6).split(3)
    _, (report,) = fit_dps(tiny_vit, batches, counts, epochs=2, progress=False)
    last = torch.stack(losses[len(losses) // 2 :])
    assert report.loss == pytest.approx(last.mean().item(), rel=1e-5)


def test_one_patch_has_no_rank_to_agree_on():
    assert spearman(torch.rand(2, 1), torch.rand(2, 1)).tolist() == [0, 0]


def test_scores_of_nothing_in_half_precision(tiny_vit):
    """Their logarithm is bounded in float32: in float16 the bound itself would be zero."""

    def score(view):
        scores = eq6(view).clone()
        scores[:, -3:] = 0
        return scores.half()

    masks, options = masks_of(tiny_vit), {"epochs": 2, "score": score, "progress": False}
    plan, _ = fit_dps(tiny_vit.half(), [smooth_images(8).half()], masks, **options)
    assert all(parameter.isfinite().all() for parameter in plan.parameters())


@torch.no_grad()
def test_fitting_wants_its_own_gradients(tiny_vit):
    _, report = fit_dps(tiny_vit, [smooth_images(8)], masks_of(tiny_vit), epochs=2)
    assert len(report) == len(CHOOSING)
