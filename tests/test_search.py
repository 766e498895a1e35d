"""Algorithm 1: what it promises, its budgets and several processes."""

import copy
import itertools

import pytest
import torch
import torch.multiprocessing as mp
from references import build, random_images

from slimvit import Masks, macs, models, prune
from slimvit.errors import DataError, SearchError, SlimvitError
from slimvit.search import fit_absorb, search
from slimvit.search.budget import measure_speedup
from slimvit.search.layer import Layer


def quick(model, batches, **options):
    return search(model, batches, **({"progress": False, "granularity": 3} | options))


def error_by_hand(model, images, masks: Masks, layer: int) -> torch.Tensor:
    """Relative error of block `layer` + 1 by timm's dense blocks, dead keys masked out: [b]."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for block in model.blocks[:layer]:
        x = block(x)
    target = model.blocks[layer](x)
    bias = torch.zeros(masks.tokens).masked_fill(~masks.keep[layer - 1], -torch.inf)
    got = model.blocks[layer](x, attn_mask=bias.expand(masks.tokens, -1))
    kept = masks.keep[layer]
    return (got - target)[:, kept].square().sum((1, 2)) / target[:, kept].square().sum((1, 2))


@torch.no_grad()
def test_errors_are_what_the_definition_says(tiny_vit, batches):
    masks = quick(tiny_vit, batches, tolerance=0.02).masks
    images = torch.cat(batches)
    for layer in range(1, masks.depth):
        expected = error_by_hand(tiny_vit, images, masks, layer).mean()
        torch.testing.assert_close(masks.errors[layer - 1], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("score", ["eq6", "attention"])
def test_errors_of_features_whose_squares_are_beyond_float16(tiny_vit, batches, dtype, score):
    """Of a residual with a channel of 300, as DINOv2 and CLIP have them."""
    with torch.no_grad():
        tiny_vit.pos_embed[..., 7] += 300
    options = {"counts": (9, 9, 9, 9, 9, 1), "score": score}
    wanted = quick(tiny_vit, batches, **options).masks.errors
    got = quick(tiny_vit.to(dtype), batches, **options).masks.errors
    torch.testing.assert_close(got[:-1].log10(), wanted[:-1].log10(), rtol=0, atol=0.5)


def test_errors_of_features_whose_squares_overflow_are_refused(tiny_vit, batches):
    with torch.no_grad():
        tiny_vit.pos_embed[..., 7] += 1e20
    with pytest.raises(SearchError, match="error of block 6 must be a number, got NaN"):
        quick(tiny_vit, batches, tolerance=0.1, score="attention")


def test_every_block_is_within_the_tolerance_and_one_token_less_is_not(tiny_vit, batches):
    result = quick(tiny_vit, batches, tolerance=0.02)
    assert (result.masks.errors <= 0.02).all()
    assert result.masks.counts[-1] == 1
    assert result.masks.counts[0] < result.masks.tokens
    fine = quick(tiny_vit, batches, tolerance=0.02, granularity=1)
    assert fine.masks.counts[-2] == result.masks.counts[-2]
    assert [entry.kept for entry in result.report] == list(result.masks.counts)
    assert result.cut == macs.cut(models.spec(tiny_vit), result.masks)


def test_looser_tolerance_keeps_less(tiny_vit, batches):
    cuts = [quick(tiny_vit, batches, tolerance=t).cut for t in (0.001, 0.01, 0.1)]
    assert cuts[0] < cuts[1] < cuts[2]


@pytest.mark.parametrize("semantics", ["drop", "zero", "idle"])
def test_semantics_are_recorded_and_searched(tiny_vit, batches, semantics):
    result = quick(tiny_vit, batches, tolerance=0.02, semantics=semantics)
    assert result.masks.semantics == semantics
    assert (result.masks.errors <= 0.02).all()


def test_provenance_is_in_the_masks(tiny_vit, batches):
    masks = prune(tiny_vit, batches, tolerance=0.02, progress=False)
    assert masks.model == "test_vit"
    assert masks.image_size == (64, 64)
    assert masks.tolerance == 0.02
    assert masks.data.startswith("10 images, ")
    assert masks.scores.shape == masks.keep.shape
    torch.testing.assert_close(masks.scores.sum(1), torch.ones(masks.depth))


def test_model_is_not_changed(tiny_vit, batches):
    tiny_vit.train()
    before = copy.deepcopy(tiny_vit.state_dict())
    quick(tiny_vit, batches, tolerance=0.05, epochs=1)
    assert tiny_vit.training
    assert all(p.requires_grad for p in tiny_vit.parameters())
    assert all(torch.equal(v, before[k]) for k, v in tiny_vit.state_dict().items())


def test_batches_may_carry_labels_and_be_split_differently(tiny_vit, batches):
    images = torch.cat(batches)
    labelled = [(images[:5], torch.zeros(5)), (images[5:], torch.zeros(5))]
    plain = quick(tiny_vit, batches, tolerance=0.02).masks
    assert torch.equal(quick(tiny_vit, labelled, tolerance=0.02).masks.keep, plain.keep)


def test_cache_bound_changes_nothing(tiny_vit, batches):
    plain = quick(tiny_vit, batches, tolerance=0.02, epochs=1).masks
    spilled = quick(tiny_vit, batches, tolerance=0.02, epochs=1, cache_bytes=0).masks
    assert torch.equal(plain.keep, spilled.keep)
    assert torch.equal(plain.scores, spilled.scores)


def test_counts_choose_by_score(tiny_vit, batches):
    counts = (12, 12, 9, 9, 5, 1)
    eq6 = quick(tiny_vit, batches, counts=counts).masks
    assert eq6.counts == counts
    other = quick(tiny_vit, batches, counts=counts, score="random").masks
    assert not torch.equal(eq6.keep, other.keep)


@pytest.mark.parametrize("cut", [0.2, 0.5])
def test_cut_is_reached_closely(tiny_vit, batches, cut):
    assert cut <= quick(tiny_vit, batches, cut=cut).cut < cut + 0.08
    uniform = quick(tiny_vit, batches, cut=cut, uniform=True).masks
    assert len(set(uniform.counts[:-1])) == 1
    assert cut <= macs.cut(models.spec(tiny_vit), uniform) < cut + 0.08


def test_cut_out_of_reach_says_so(tiny_vit, batches):
    with pytest.raises(SlimvitError, match=r"cut 0.99 is out of reach"):
        quick(tiny_vit, batches, cut=0.99)


@pytest.mark.parametrize("semantics", ["drop", "zero", "idle"])
def test_uniform_counts_reach_the_cut_by_the_semantics(tiny_vit, batches, semantics):
    options = {"uniform": True, "semantics": semantics}
    result = quick(tiny_vit, batches, cut=0.3, **options)
    assert result.masks.semantics == semantics
    assert 0.3 <= result.cut < 0.38
    words = rf"cut 0.99 is out of reach by uniform pruning: semantics {semantics} can cut 0\.\d+$"
    with pytest.raises(SearchError, match=words) as error:
        quick(tiny_vit, batches, cut=0.99, **options)
    most = float(str(error.value).split()[-1])
    assert quick(tiny_vit, batches, cut=most, **options).cut == pytest.approx(most, abs=1e-3)


def test_speedup_is_measured(tiny_vit, batches, monkeypatch):
    seen = []

    def measured(model, masks, images):
        seen.append(masks.counts)
        assert images.shape == batches[0].shape
        return macs.gmacs(models.spec(model)) / macs.gmacs(models.spec(model), masks)

    monkeypatch.setattr("slimvit.search.api.measure_speedup", measured)
    result = quick(tiny_vit, batches, speedup=1.5)
    assert seen
    assert 1 / (1 - result.cut) >= 1.5


def test_half_precision(tiny_vit, batches):
    masks = quick(tiny_vit.bfloat16(), batches, cut=0.3).masks
    assert measure_speedup(tiny_vit, masks, batches[0], rounds=1) > 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_measured_speedup_is_a_ratio_of_times_on_the_models_device(tiny_vit, device):
    masks = Masks.from_counts((5, 5, 5, 5, 5, 1), (4, 4))
    images = torch.randn(8, 3, 64, 64)
    assert measure_speedup(tiny_vit.to(device), masks, images, rounds=1) > 0
    with pytest.raises(DataError, match="no images to measure a speed-up with"):
        measure_speedup(tiny_vit, masks, None)


def test_error_that_is_no_number_is_named(tiny_vit, batches, monkeypatch):
    def broken(self, features, batch, n):
        return torch.full((3,), float("nan"))

    monkeypatch.setattr(Layer, "relative_error", broken)
    with pytest.raises(SlimvitError, match="relative error of block 6 must be a number, got NaN"):
        quick(tiny_vit, batches, tolerance=0.1)


def test_an_error_beyond_what_means_can_hold_is_not_within_the_tolerance(
    tiny_vit, batches, monkeypatch
):
    monkeypatch.setattr(Layer, "relative_error", lambda *_: torch.full((3,), 1e9))
    assert quick(tiny_vit, batches, tolerance=0.02).masks.counts == (17, 17, 17, 17, 17, 1)


def patches(view):
    """A score by which registers are worth nothing."""
    scores = torch.ones_like(view.paths)
    scores[:, 1:3] = 0
    return scores


@pytest.mark.parametrize(("tolerance", "score"), [(0.3, patches), (60.0, "eq6")])
def test_registers_are_kept_whatever_they_score(tolerance, score):
    model = build("no_embed_class")
    masks = quick(
        model, [random_images(model, 3)], tolerance=tolerance, score=score, granularity=1
    ).masks
    assert masks.keep[:-1, : masks.prefix].all()


PLANS = {"plain": {"tolerance": 0.02}, "tuned": {"tolerance": 0.05, "epochs": 1}}


def process(rank: int, folder: str, model, batches) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    for name, options in PLANS.items():
        masks = quick(model, batches[rank::2], **options).masks
        masks.save(f"{folder}/{name}-{rank}.safetensors")
    few = quick(model, batches[rank:1], cut=0.4).masks
    few.save(f"{folder}/few-{rank}.safetensors")
    images = None if rank == 0 else batches[0]
    speed = measure_speedup(model, few, images, rounds=1)
    plan = fit_absorb(model, batches[rank:1], cut=0.3, progress=False)[0]
    torch.save((speed, plan.counts), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_find_the_masks_of_one(tiny_vit, batches, tmp_path):
    batches = list(torch.cat(batches).split(2))  # five: one process has three, the other two
    mp.spawn(process, (str(tmp_path), tiny_vit, batches), nprocs=2)
    for name, options in PLANS.items():
        one = quick(tiny_vit, batches, **options).masks
        for rank in (0, 1):
            two = Masks.load(tmp_path / f"{name}-{rank}.safetensors")
            assert torch.equal(two.keep, one.keep)
            assert two.data == one.data
            torch.testing.assert_close(two.scores, one.scores)
    few = quick(tiny_vit, batches[:1], cut=0.4).masks  # the other process has no batch at all
    for rank in (0, 1):
        assert torch.equal(Masks.load(tmp_path / f"few-{rank}.safetensors").keep, few.keep)
    (speed, counts), second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert speed > 0 and (speed, counts) == second
    assert counts == fit_absorb(tiny_vit, batches[:1], cut=0.3, progress=False)[0].counts


TUNING = {"counts": (12, 12, 9, 9, 5, 1), "epochs": 1, "lr": 1e-3}


def uneven(rank: int, folder: str, model, shares) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    for number, share in enumerate(shares):
        torch.save(quick(model, share[rank], **TUNING), f"{folder}/{number}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_may_have_any_number_of_batches(tiny_vit, batches, tmp_path):
    """They go round the processes that still have one."""
    batches = list(torch.cat(batches).split(2))
    shares = [(batches[:first], batches[first:]) for first in (5, 4, 1)]
    mp.spawn(uneven, (str(tmp_path), tiny_vit, shares), nprocs=2)
    for number, share in enumerate(shares):
        turns = [b for turn in itertools.zip_longest(*share) for b in turn if b is not None]
        one = quick(tiny_vit, turns, **TUNING)
        for rank in (0, 1):
            two = torch.load(tmp_path / f"{number}-{rank}.pt", weights_only=False)
            assert torch.equal(two.masks.keep, one.masks.keep)
            start, wanted, found = (m.state_dict() for m in (tiny_vit, one.model, two.model))
            for key in wanted:
                # Keys' biases change no answer: AdamW steps by the sign of what is rounding there.
                if not key.endswith("qkv.bias"):
                    moved = (wanted[key] - start[key]).norm()
                    assert (found[key] - wanted[key]).norm() <= 0.01 * moved, key


def test_empty_batches_are_nothing():
    model = build("deit")
    images, options = random_images(model, 6), {"tolerance": 0.02, "epochs": 1}
    found = quick(model, [images[:0], images], **options)
    assert torch.equal(found.masks.keep, quick(model, [images], **options).masks.keep)
