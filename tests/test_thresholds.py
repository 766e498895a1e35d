"""Absorb with thresholds: each image keeps a number of patches of its own."""

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
from instruction_sets import DTYPES, isa  # noqa: F401
from references import build, off, random_images, sharpened
from test_absorb import by_loops, made_view
from test_cpu_spvit import check_batches
from test_cpu_vit import PRECISIONS, mean_off, threads  # noqa: F401
from test_dynamic_vit import answer
from torch import Tensor

from slimvit import DPS, Absorb, accelerate, apply_masks, load_plan
from slimvit.errors import DataError, ExportError, PlanError, SlimvitError, UsageError
from slimvit.export import export_onnx, export_program
from slimvit.macs import gmacs, image_gmacs, mean_gmacs
from slimvit.masks import Masks
from slimvit.models import spec
from slimvit.ops import AbsorbParts, Threshold, pack_chooser
from slimvit.search import fit_thresholds

FLOAT32 = 1e-5
MODELS = ["deit", "deit_distilled", "dinov2_reg4", "oblong"]


def counts_of(name: str) -> tuple[int, int, int]:
    read = spec(build(name))
    return read.prefix + read.patches * 3 // 4, read.prefix + read.patches // 2, read.head_tokens


@functools.cache
def plan_of(name: str) -> Absorb:
    """Thresholds rounded, so that no score of the images that they were fitted to lies on one."""
    images = random_images(build(name), 12)
    found = fit_thresholds(build(name), Absorb(counts=counts_of(name)), [images], progress=False)
    thresholds = [round(value, 3) for value in found.thresholds]
    return Absorb(counts=found.counts, thresholds=thresholds).bind(found.spec)


def make(name: str, dtype: torch.dtype = torch.float32):
    return accelerate(build(name), plan_of(name), backend="cpu", precision=PRECISIONS[dtype])


def lengths(kept: list[Tensor]) -> list[list[int]]:
    """Tokens that each image keeps in each block."""
    return torch.stack([(places >= 0).sum(1) for places in kept], 1).tolist()


class TestChoice:
    @pytest.mark.parametrize("prefix", [1, 2])
    @pytest.mark.parametrize("value", [0.0, 0.02, 0.05, 0.1, 0.2, 10.0])
    def test_equals_loops(self, value, prefix):
        plan = Absorb(counts=[24, 19], thresholds=[0, value])
        plan._average, plan.spec = ((33, 24), (24, 19)), spec(build("deit"))
        for image in range(2):
            view = made_view(33, prefix, slice(image, image + 1))
            index, into, weight = plan.choose(1, view, None)
            some = min(3 * (33 - 33 * 19 // 24), 33 - prefix - 1)
            kept, goes = by_loops(view, 0, None, value, some)
            assert index[0].tolist() == kept
            assert [kept[k] for k in into[0].tolist()] == list(goes.values())
            assert weight.shape == (1, 33)
            if value in (0.0, 10.0):
                assert len(kept) == (33 if value == 0 else 33 - some)

    def test_takes_one_image_a_call(self):
        plan = Absorb(counts=[24, 19], thresholds=[0, 0.1])
        plan._average, plan.spec = ((33, 24), (24, 19)), spec(build("deit"))
        with pytest.raises(PlanError, match="one image a call, got 2"):
            plan.choose(1, made_view(33, 1), None)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"thresholds": [0.1, 0.1]}, "one for each of 3 blocks, got 2"),
            ({"thresholds": [0.1, -0.1, 0]}, r"finite and at least 0, got -0.1"),
            ({"thresholds": [0.1, float("nan"), 0]}, "finite and at least 0, got nan"),
            ({"counts": [12, 1, 1]}, r"every block but the last .* got counts \[12, 1, 1\]"),
            ({"counts": [12, 9, 9]}, "the last none"),
        ],
    )
    def test_refused(self, changes, words):
        with pytest.raises(PlanError, match=words):
            Absorb(**{"counts": [12, 8, 1], "thresholds": [0.1] * 3} | changes).bind(
                spec(build("deit"))
            )

    def test_in_training_the_counts_hold(self):
        slim = apply_masks(build("deit"), plan_of("deit"))
        left = slim.train().trace(random_images(build("deit"), 5))[1]
        assert [alive.x.shape[0] for alive in left] == list(counts_of("deit"))

    def test_file(self, tmp_path):
        path, plan = tmp_path / "plan.safetensors", plan_of("deit")
        plan.save(path)
        again, images = load_plan(path), random_images(build("deit"), 4)
        assert again.thresholds == plan.thresholds and again.counts == plan.counts
        ours, theirs = (apply_masks(build("deit"), each).eval() for each in (plan, again))
        assert torch.equal(ours(images), theirs(images))


class TestModel:
    """In plain PyTorch."""

    def test_a_batch_is_its_images_one_after_another(self):
        slim, images = (
            apply_masks(build("deit"), plan_of("deit")).eval(),
            random_images(build("deit"), 7),
        )
        kept = slim.kept_sets(images)
        alone = [slim.kept_sets(image) for image in images.split(1)]
        for b, sets in enumerate(alone):
            for mine, theirs in zip(kept, sets, strict=True):
                n = theirs.shape[1]
                assert torch.equal(mine[b, :n], theirs[0]) and (mine[b, n:] == -1).all()
        for call in (slim, slim.forward_features):
            assert torch.equal(call(images), torch.cat([call(image) for image in images.split(1)]))
        assert len({tuple(counts) for counts in lengths(kept)}) > 2

    @pytest.mark.parametrize("name", MODELS)
    def test_fixed_counts_answer_alike(self, name):
        """An image answers as by the plan of the counts that it came to have."""
        images = random_images(build(name), 4)
        slim, compared = apply_masks(build(name).double(), plan_of(name)).eval(), 0
        for image, counts in zip(
            images.double().split(1), lengths(slim.kept_sets(images.double()))
        ):
            fixed = apply_masks(build(name).double(), Absorb(counts=counts)).eval()
            if all(map(torch.equal, slim.kept_sets(image), fixed.kept_sets(image))):
                assert off(slim(image), fixed(image)) < 1e-11
                compared += 1
        assert compared  # others have other candidates

    def test_no_cuda_graphs(self):
        """Their counts are read on the host."""
        message = "a CUDA graph needs a plan whose images all keep as many patches"
        with pytest.raises(UsageError, match=message):
            accelerate(build("deit"), plan_of("deit"), batch_sizes=[1], cuda_graphs=True)
        with pytest.raises(UsageError, match=message):
            accelerate(build("deit"), plan_of("deit")).warm_up(1, cuda_graph=True)

    def test_work_is_counted_for_each_image(self):
        shape, plan = spec(build("deit")), plan_of("deit")
        slim, images = apply_masks(build("deit"), plan).eval(), random_images(build("deit"), 5)
        kept = slim.kept_sets(images)
        found = image_gmacs(shape, plan, kept)
        for value, counts in zip(found.tolist(), lengths(kept), strict=True):
            like = plan.with_counts(counts)
            assert value == gmacs(shape, like)
            network = Absorb(counts=counts).bind(shape)
            difference = value - gmacs(shape, network)  # other candidates
            assert difference == pytest.approx((like.macs(shape) - network.macs(shape)) / 1e9)
        assert len(set(found.tolist())) > 2
        batches = [(images[:2], None), (images[2:], None)]
        assert mean_gmacs(shape, plan, slim, batches) == pytest.approx(found.mean().item())
        fixed = Absorb(counts=plan.counts).bind(shape)
        assert mean_gmacs(shape, fixed, slim, []) == gmacs(shape, fixed)

    @pytest.mark.parametrize("export", [export_onnx, export_program])
    def test_is_not_exported(self, export, tmp_path):
        slim = apply_masks(build("deit"), plan_of("deit"))
        with pytest.raises(ExportError, match="another number of patches of each image: a file"):
            export(slim, tmp_path / "slim")
        assert not list(tmp_path.iterdir())


def process(rank: int, folder: str, model, batches) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    plan = fit_thresholds(model, Absorb(cut=0.3), batches[rank::2], progress=False)
    plan.save(f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_two_processes_find_the_thresholds_of_one(tiny_vit, tmp_path):
    batches = random_images(tiny_vit, 5).split(2)  # three: one process has two, the other one
    torch.multiprocessing.spawn(process, (str(tmp_path), tiny_vit, batches), nprocs=2)
    wanted = fit_thresholds(tiny_vit, Absorb(cut=0.3), batches, progress=False).thresholds
    first, second = (load_plan(tmp_path / f"{rank}.safetensors").thresholds for rank in (0, 1))
    assert first == second
    assert first == pytest.approx(wanted, rel=1e-5)


class TestFit:
    @pytest.mark.parametrize("name", MODELS)
    def test_images_cost_what_the_counts_do(self, name):
        model, images = build(name), random_images(build(name), 24)
        plan = Absorb(counts=counts_of(name)).bind(spec(model))
        found = fit_thresholds(model, plan, images.split(7), progress=False)
        assert found.counts == plan.counts
        assert [value > 0 for value in found.thresholds] == [True, True, False]
        slim = apply_masks(model, found).eval()
        mean = mean_gmacs(plan.spec, found, slim, [images])
        assert mean == pytest.approx(gmacs(plan.spec, plan), rel=0.02)
        assert torch.tensor(lengths(slim.kept_sets(images))).double().mean(0).tolist() == (
            pytest.approx(list(plan.counts), abs=1)
        )

    def test_one_image_keeps_the_counts(self):
        model, images = build("deit"), random_images(build("deit"), 8)
        plan = Absorb(counts=counts_of("deit"))
        for image in images.split(1):
            found = fit_thresholds(model, plan, [image], progress=False)
            kept = apply_masks(model, found).eval().kept_sets(image)
            assert lengths(kept) == [list(plan.counts)]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        images, plan = random_images(build("deit"), 9), Absorb(counts=counts_of("deit"))
        whole = fit_thresholds(build("deit"), plan, [images], progress=False)
        model = copy.deepcopy(build("deit")).to(dtype)
        half = fit_thresholds(model, plan, [images], progress=False)
        assert half.thresholds == pytest.approx(whole.thresholds, rel=0.1)

    def test_is_the_same_however_images_are_batched(self):
        images = random_images(build("deit"), 9)
        plan = Absorb(counts=counts_of("deit"))
        whole = fit_thresholds(build("deit"), plan, [images], progress=False)
        parts = fit_thresholds(build("deit"), plan, images.flip(0).split(2), progress=False)
        assert parts.thresholds == pytest.approx(whole.thresholds, rel=1e-5)

    def test_refused(self):
        model, plan = build("deit"), Absorb(counts=counts_of("deit"))
        with pytest.raises(DataError, match="no images to find thresholds by"):
            fit_thresholds(model, plan, [], progress=False)
        with pytest.raises(UsageError, match="thresholds are for Absorb, got DPS"):
            fit_thresholds(model, DPS(plan.counts), [], progress=False)
        images = torch.full((1, *random_images(model, 1).shape[1:]), torch.nan)
        with pytest.raises(SlimvitError, match="block 1: scores are not finite"):
            fit_thresholds(model, plan, [images], progress=False)

    def test_prune_writes_them(self, prune, tiny_vit):
        status, out, error = prune("--absorb", "--cut", "0.3", "--per-image", "--json", "a.json")
        assert status == 0, error
        assert "G an image, on average; 6 images" in out
        plan, report = load_plan("plan.safetensors"), json.loads(Path("a.json").read_text())
        assert plan.ragged and list(plan.thresholds) == report["thresholds"]

    def test_prune_needs_absorb_for_them(self, prune):
        status, _, error = prune("--cut", "0.3", "--per-image")
        assert status == 2 and "--per-image has no meaning without --absorb" in error


@pytest.mark.usefixtures("isa", "poison_empty")
class TestKernels:
    @pytest.mark.parametrize("name", MODELS)
    def test_float32(self, name):
        fast, images = make(name), random_images(build(name), 5)
        features, logits, kept = answer(name, plan_of(name), images, torch.float64)
        assert all(map(torch.equal, fast.kept_sets(images), kept))
        assert off(fast.forward_features(images), features) < FLOAT32
        assert off(fast(images), logits) < FLOAT32

    def test_bfloat16(self):
        """Most images keep as many patches, and answer alike."""
        images = random_images(build("deit"), 24)
        fast = make("deit", torch.bfloat16)
        _, logits, kept = answer("deit", plan_of("deit"), images, torch.float64)
        ours, theirs = (torch.tensor(lengths(each)) for each in (fast.kept_sets(images), kept))
        same = (ours == theirs).all(1)
        assert same.double().mean() > 0.6
        assert mean_off(fast(images)[same], logits[same]) < 0.05

    @pytest.mark.parametrize("value", [0.0, 10.0])
    def test_none_or_all_candidates_go(self, value):
        model = build("deit")
        plan = Absorb(counts=counts_of("deit"), thresholds=[value] * 3)
        images = random_images(model, 3)
        fast = accelerate(model, plan, backend="cpu")
        bound = plan.bind(spec(model))
        features, logits, kept = answer("deit", bound, images, torch.float64)
        m = 17 if value == 0 else 17 - bound.threshold(0).candidates(17, 1)
        assert [sets.shape[1] for sets in kept][0] == m
        assert all(map(torch.equal, fast.kept_sets(images), kept))
        assert off(fast.forward_features(images), features) < FLOAT32
        assert off(fast(images), logits) < FLOAT32

    def test_a_threshold_of_zero_keeps_what_nothing_reads(self):
        """Scores of zero are not below it."""
        model, images = sharpened("deit", 1000), random_images(build("deit"), 3)
        plan = Absorb(counts=counts_of("deit"), thresholds=[0.0] * 3)
        for backend in ("cpu", "torch"):
            fast = accelerate(model, plan, backend=backend, precision="float32")
            assert lengths(fast.kept_sets(images)) == [[17, 17, 1]] * 3


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_and_threads_do_not_matter(dtype):
    fast, images = make("deit_distilled", dtype), random_images(build("deit_distilled"), 13)
    assert len(set(map(tuple, lengths(fast.kept_sets(images))))) > 2
    check_batches(fast, images)


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("count", [1, 2])
def test_nan_stays_in_its_image_and_call(count):
    torch.set_num_threads(count)
    fast, images = make("deit"), random_images(build("deit"), 5)
    wanted, nan = fast(images), images.clone()
    nan[3, 1, 20, 20] = torch.nan
    got, others = fast(nan), [0, 1, 2, 4]
    assert torch.equal(got[others], wanted[others])
    assert got[3].isnan().all()
    assert torch.equal(fast(images), wanted)


def test_auto_takes_the_kernels():
    assert accelerate(build("deit"), plan_of("deit")).backend == "cpu"


def test_packs_are_checked():
    for threshold, words in (
        (Threshold(-1.0, 9, 5), "threshold must not be negative, got -1"),
        (Threshold(0.1, 9, 9), r"after must be in \[1, before - 1\] = \[1, 8\], got 9"),
    ):
        with pytest.raises(SlimvitError, match=words):
            pack_chooser(AbsorbParts(1, threshold), 64)


@pytest.mark.parametrize("plan", [None, Masks.from_counts((9, 5, 1), (4, 4)), DPS((9, 5, 1))])
def test_thresholds_are_for_absorb_alone(plan):
    with pytest.raises(UsageError, match=f"for Absorb, got {type(plan).__name__}"):
        fit_thresholds(build("deit"), plan, [], progress=False)


def test_empty_batches_are_nothing():
    images = random_images(build("deit"), 4)
    plan, options = Absorb(counts=counts_of("deit")), {"progress": False}
    wanted = fit_thresholds(build("deit"), plan, [images], **options).thresholds
    got = fit_thresholds(build("deit"), plan, [images[:0], images], **options).thresholds
    assert got == wanted
    with pytest.raises(DataError, match="no images"):
        fit_thresholds(build("deit"), plan, [images[:0]], **options)


@pytest.mark.parametrize("wrong", [(3, 3, 32, 64), (3, 64, 64)])
def test_wrong_images_are_told_as_they_came(wrong):
    slim = apply_masks(build("deit"), plan_of("deit")).eval()
    for call in (slim, slim.forward_features, slim.kept_sets):
        with pytest.raises(SlimvitError, match=r"images must be \[B, 3, 64, 64\], got \[3, 3?"):
            call(torch.zeros(wrong))
