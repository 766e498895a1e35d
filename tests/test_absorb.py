"""Absorb and its counts, and static masks as a plan."""

import pytest
import timm
import torch
from planners import Largest
from references import build, random_images, random_masks

from slimvit import Absorb, apply_masks
from slimvit.dynamic import Alive, Shape, Static, View, counts_for_cut
from slimvit.errors import PlanError
from slimvit.macs import cut
from slimvit.masks import Masks
from slimvit.models import block_parts, spec


class TestCounts:
    @pytest.mark.parametrize(
        ("counts", "words"),
        [
            ([17, 9], "one for each of 3 blocks, got 2"),
            ([18, 9, 1], r"N = 17 or less .*got \[18, 9, 1\]"),
            ([9, 12, 1], "not grow with depth"),
            ([9, 0, 0], "keep the 1 prefix tokens"),
            ([9, 5, 0], "the 1 that the head reads"),
            ([9.5, 5, 1], "each of counts must be a whole number, got 9.5"),
        ],
    )
    def test_that_do_not_fit(self, counts, words):
        model = build("deit")
        with pytest.raises(PlanError, match=words):
            apply_masks(model, Absorb(counts=counts))

    def test_missing(self):
        with pytest.raises(PlanError, match="test-largest: counts are missing"):
            apply_masks(build("deit"), Largest(None, width=48))

    def test_unbound(self):
        with pytest.raises(PlanError, match="absorb: bind it to a model first"):
            _ = Absorb(counts=[1]).alive


def made_view(m: int, prefix: int, images: slice = slice(2)) -> View:
    """A block between its keys and its queries, of two images; some patches are much alike."""
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, 2, 48, generator=generator, dtype=torch.float64)
    x[1::3] = x[0 : m - 1 : 3] + 0.3 * x[1::3]
    size = 1 + torch.rand(2, m, generator=generator)
    place = torch.arange(m).expand(2, -1)
    block = block_parts(build("deit").double())[1]
    x, place, size = x[:, images], place[images], size[images]
    with torch.no_grad():
        return View(Alive(x, place, size), block, block.norm1(x), prefix, head_tokens=1)


def by_loops(
    view: View, b: int, n: int | None, below: float = 0.0, some: int = 0
) -> tuple[list[int], dict[int, int]]:
    """Which tokens of image b stay, n or all but those below a threshold, and where others go."""
    m, prefix = len(view.y), view.prefix
    lengths = view.values[b].norm(dim=-1)  # [H, m]
    importance = (view.class_attention()[b] * lengths).sum(0).tolist()
    y = view.y[:, b]
    order = sorted(range(prefix, m), key=lambda i: (-importance[i], i))
    ahead = {i: order[:rank] for rank, i in enumerate(order)}

    def cosine(i: int, j: int) -> float:
        return float(y[i] @ y[j] / (y[i].norm() * y[j].norm()))

    def score(i: int) -> float:
        return importance[i] ** 0.5 * (1 - max((cosine(i, j) for j in ahead[i]), default=-1.0))

    if n is None:
        total = sum(importance) ** 0.5
        pruned = sorted(i for i in order[m - prefix - some :] if score(i) < below * total)
    else:
        pruned = sorted(sorted(order[-3 * (m - n) :], key=score)[: m - n])
    kept = [i for i in range(m) if i not in pruned]
    goes = {
        i: max((j for j in ahead[i] if j in kept), key=lambda j, i=i: cosine(i, j)) for i in pruned
    }
    return kept, goes


class TestAbsorb:
    @pytest.mark.parametrize("wanted", [0.1, 0.25, 0.45, 0.6])
    @pytest.mark.parametrize(
        "name",
        ["deit_tiny_patch16_224", "deit_small_distilled_patch16_224", "vit_base_patch32_224"],
    )
    def test_saves_what_is_asked_for(self, wanted, name):
        with torch.device("meta"):
            shape = spec(timm.create_model(name))
        plan = Absorb(cut=wanted).bind(shape)
        found = cut(shape, plan)
        assert wanted <= found < wanted + 0.02
        assert plan.counts[0] == shape.tokens
        assert plan.counts[-1] == shape.head_tokens
        assert plan.bind(shape).counts == plan.counts
        assert Absorb(counts=plan.counts).bind(shape).counts == plan.counts

    @pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, float("nan"), "0.4"])
    def test_cuts_out_of_range(self, value):
        with pytest.raises(
            PlanError, match="cut must be (a number|finite, above 0 and below 1), got"
        ):
            Absorb(cut=value)

    def test_a_cut_out_of_reach(self):
        with pytest.raises(PlanError, match=r"cut must be at most 0\.\d+ for .*, got 0.95"):
            apply_masks(build("deit"), Absorb(cut=0.95))

    def test_every_block_but_the_last_keeps_a_patch(self):
        shape = spec(build("deit_distilled"))
        steep = Shape(whole=0, power=1.0, steepest=0.0)
        counts = counts_for_cut(shape, 0.58, lambda counts: Absorb(counts=counts), steep)
        assert min(counts[:-1]) == shape.prefix + 1

    def test_one_of_cut_and_counts(self):
        for arguments in ({}, {"cut": 0.4, "counts": [1]}):
            with pytest.raises(PlanError, match="give one of cut and counts"):
                Absorb(**arguments)

    @pytest.mark.parametrize("prefix", [1, 2])
    @pytest.mark.parametrize("n", [4, 17, 30, 32])
    def test_equals_loops(self, n, prefix):
        view = made_view(m=33, prefix=prefix)
        index, into, weight = Absorb(counts=[n]).choose(0, view, n)
        for b in range(2):
            kept, goes = by_loops(view, b, n)
            assert index[b].tolist() == kept
            assert [kept[k] for k in into[b].tolist()] == list(goes.values())
        assert weight.shape == (2, 33) and (weight > 0).all()

    def test_sizes_grow_by_what_is_absorbed(self):
        model = build("deit")
        slim = apply_masks(model, Absorb(counts=[12, 6, 5]))
        with torch.no_grad():
            left = slim.trace(random_images(model, 3))[1]
        for alive in left:
            assert (alive.size[:, 0] == 1).all()  # nothing goes into the class token
            assert (alive.size >= 1).all()
            assert (alive.size.sum(1) <= 17).all()  # a token counts for itself at most
            assert (alive.size.sum(1) > alive.size.shape[1]).all()


class TestStatic:
    @pytest.mark.parametrize("semantics", ["zero", "idle"])
    def test_other_semantics(self, semantics):
        masks = random_masks(build("deit"), semantics)
        with pytest.raises(PlanError, match=f"semantics 'drop', got '{semantics}'"):
            Static(masks)

    def test_of_another_model(self):
        masks = random_masks(build("dinov2_reg4"))
        with pytest.raises(PlanError, match=r"keep must be \[L, N\] = \[3, 17\].*got \[3, 21\]"):
            apply_masks(build("deit"), Static(masks))

    def test_registers_pruned_ahead_of_patches(self):
        model = build("dinov2_reg4")
        keep = torch.ones(3, 21, dtype=torch.bool)
        keep[-1, 1:5] = False
        with pytest.raises(PlanError, match="all 5 prefix tokens or no patch"):
            apply_masks(model, Static(Masks(keep, 5, (4, 4))))
