"""Masks: what they refuse, their order and their makers."""

import numpy as np
import pytest
import torch

from slimvit.errors import MasksError
from slimvit.masks import Masks
from slimvit.masks._masks import even_spread

GRID = (3, 4)


def example(**info) -> Masks:
    return Masks.from_counts([11, 8, 8, 3], GRID, prefix=2, **info)


def full(**info) -> Masks:
    return example(
        semantics="zero",
        model="deit_tiny_patch16_224",
        image_size=(48, 64),
        tolerance=0.0123456789,
        data="a1b2",
    ).replace(
        **{
            "scores": torch.rand(4, 14, generator=torch.Generator().manual_seed(0)),
            "errors": torch.tensor([0.1, 0.2, 0.3, 0.4]),
            **info,
        }
    )


def random_keep(depth: int, tokens: int, prefix: int, seed: int) -> torch.Tensor:
    """Nested at random; the last block may prune all prefix tokens but the first."""
    generator = torch.Generator().manual_seed(seed)
    lifetime = torch.randint(0, depth + 1, (tokens,), generator=generator)
    lifetime[:prefix] = depth - torch.randint(0, 2, (prefix,), generator=generator)
    lifetime[0] = depth
    return lifetime >= torch.arange(1, depth + 1)[:, None]


class TestRules:
    def keep(self, *cleared: tuple[int, int]) -> torch.Tensor:
        keep = torch.ones(3, 14, dtype=torch.bool)
        for layer, token in cleared:
            keep[layer, token] = False
        return keep

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"keep": torch.ones(3, 14)},
                "keep must be [L, N] booleans, got torch.float32 [3, 14]",
            ),
            ({"keep": torch.ones(14, dtype=torch.bool)}, "booleans, got torch.bool [14]"),
            ({"keep": [[True] * 14] * 3}, "keep must be [L, N] booleans, got list"),
            ({"keep": torch.ones(3, 14, dtype=torch.bool, device="meta")}, "on the CPU, got meta"),
            ({"keep": torch.ones(3, 13, dtype=torch.bool)}, "got N = 13"),
            ({"keep": torch.ones(0, 14, dtype=torch.bool)}, "at least one token"),
            ({"keep": torch.zeros(3, 14, dtype=torch.bool)}, "the last keeps none"),
            ({"prefix": 1}, "grid (3, 4) plus 1 prefix tokens, got N = 14"),
            ({"prefix": -1, "grid": (3, 5)}, "prefix must be at least 0, got -1"),
            ({"grid": (4, 4)}, "tokens must be grid (4, 4)"),
            ({"grid": (-3, -4)}, "grid must be two positive whole numbers, got (-3, -4)"),
            ({"grid": (12,)}, "grid must be two positive whole numbers"),
            ({"grid": (3.0, 4.0)}, "grid must be two positive whole numbers"),
            ({"grid": None}, "grid must be two positive whole numbers, got None"),
            ({"image_size": 224}, "image_size must be two positive whole numbers, got 224"),
            ({"image_size": (224, 0)}, "image_size must be two positive whole numbers"),
            ({"semantics": "gone"}, "one of drop, zero, idle, got 'gone'"),
            ({"scores": torch.ones(14)}, "scores must be [3, 14], got [14]"),
            ({"errors": torch.ones(2)}, "errors must be [3], got [2]"),
            ({"scores": np.ones((3, 14))}, "scores must be a tensor [3, 14], got ndarray"),
            ({"scores": torch.ones(3, 14) > 0}, "scores must be real numbers, got torch.bool"),
            ({"scores": torch.ones(3, 14, dtype=torch.complex64)}, "real numbers, got"),
            ({"scores": torch.ones(3, 14, device="meta")}, "got torch.float32 on meta"),
            ({"scores": torch.full((3, 14), float("nan"))}, "scores must be finite, got NaN"),
            ({"errors": torch.full((3,), float("inf"))}, "errors must be finite, got NaN or inf"),
            ({"errors": torch.full((3,), 1e300, dtype=torch.float64)}, "errors must be finite"),
            ({"model": None}, "model must be text, got None"),
            ({"data": 3}, "data must be text, got 3"),
            ({"tolerance": 0.0}, "tolerance must be finite and above 0, got 0.0"),
            ({"tolerance": float("nan")}, "tolerance must be finite and above 0, got nan"),
            ({"tolerance": float("inf")}, "tolerance must be finite and above 0, got inf"),
        ],
    )
    def test_refused(self, change, message):
        fits = {"keep": self.keep(), "prefix": 2, "grid": GRID}
        with pytest.raises(MasksError) as caught:
            Masks(**{**fits, **change})
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_nesting(self):
        with pytest.raises(MasksError, match="nested: block 3 keeps token 9, block 2 does not"):
            Masks(self.keep((1, 9)), 2, GRID)

    @pytest.mark.parametrize("layer", [0, 1])
    def test_prefix_tokens_are_kept(self, layer):
        keep = self.keep(*((later, 1) for later in range(layer, 3)))
        with pytest.raises(MasksError, match=f"block {layer + 1} prunes token 1"):
            Masks(keep, 2, GRID)

    def test_last_block_may_prune_prefix_tokens(self):
        assert Masks(self.keep((2, 1)), 2, GRID).counts == (14, 14, 13)

    def test_pairs_are_tuples(self):
        masks = Masks(self.keep(), 2, list(GRID), image_size=[48, 64])
        assert (masks.grid, masks.image_size) == (GRID, (48, 64))

    def test_are_their_own(self):
        """What was checked holds, whatever becomes of the tensors that were given."""
        keep, scores, errors = self.keep((2, 5)), torch.ones(3, 14), torch.ones(3)
        masks = Masks(keep, 2, GRID, scores=scores.requires_grad_(), errors=errors)
        turned = Masks(keep.t().contiguous().t(), 2, GRID)
        with torch.no_grad():
            for given in (keep, scores, errors):
                given.zero_()
        assert masks.counts == turned.counts == (14, 14, 13)
        assert masks.scores.sum() == 42 and not masks.scores.requires_grad
        assert masks.errors.sum() == 3 and turned.keep.is_contiguous()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
    def test_scores_and_errors_are_float32(self, dtype):
        scores, errors = torch.ones(3, 14, dtype=dtype), torch.ones(3, dtype=dtype)
        masks = Masks(self.keep(), 2, GRID, scores=scores, errors=errors)
        assert masks.scores.dtype == masks.errors.dtype == torch.float32

    def test_replace_validates(self):
        assert example().replace(semantics="idle").semantics == "idle"
        with pytest.raises(MasksError, match="semantics"):
            example().replace(semantics="gone")


class TestOrder:
    @pytest.mark.parametrize("prefix", [0, 1, 2, 5])
    @pytest.mark.parametrize("depth", [1, 2, 12])
    def test_every_kept_set_is_a_prefix(self, prefix, depth):
        for seed in range(10):
            masks = Masks(random_keep(depth, 63 + prefix, prefix, seed), prefix, (7, 9))
            assert masks.order.sort().values.tolist() == list(range(63 + prefix))
            for keep, n in zip(masks.keep, masks.counts, strict=True):
                assert set(masks.order[:n].tolist()) == set(keep.nonzero()[:, 0].tolist())

    def test_prefix_tokens_stand_first(self):
        masks = example()
        assert masks.order[:2].tolist() == [0, 1]

    def test_ties_keep_the_models_order(self):
        assert Masks.dense(3, GRID, 2).order.tolist() == list(range(14))


class TestMakers:
    def test_from_counts(self):
        masks = example()
        assert masks.counts == (11, 8, 8, 3)
        assert masks.alive == (14, 11, 8, 8)
        assert (masks.depth, masks.tokens) == (4, 14)
        assert repr(masks) == "Masks(drop, kept 11,8,8,3)"

    @pytest.mark.parametrize("counts", [[14] * 4, [2, 2, 2, 1], [14, 2, 1], [1]])
    def test_from_counts_at_the_ends(self, counts):
        assert Masks.from_counts(counts, GRID, 2).counts == tuple(counts)

    def test_from_counts_by_scores(self):
        scores = torch.zeros(14)
        scores[[5, 13, 2]] = torch.tensor([3.0, 2.0, float("inf")])
        masks = Masks.from_counts([5, 3], GRID, 2, scores=scores)
        assert masks.keep[0].nonzero()[:, 0].tolist() == [0, 1, 2, 5, 13]
        assert masks.keep[1].nonzero()[:, 0].tolist() == [0, 1, 2]

    @pytest.mark.parametrize(
        ("counts", "message"),
        [
            ([], r"\[1, N\] = \[1, 14\], got \[\]"),
            ([15, 3], r"\[1, N\] = \[1, 14\], got \[15, 3\]"),
            ([3, 0], r"\[1, N\] = \[1, 14\], got \[3, 0\]"),
            (None, "counts must be whole numbers in a list, got None"),
            (5, "counts must be whole numbers in a list, got 5"),
            ([5, 7, 3], r"must not grow with depth, got \[5, 7, 3\]"),
            ([1, 1], "block 1 prunes token 1"),
        ],
    )
    def test_from_counts_refused(self, counts, message):
        with pytest.raises(MasksError, match=message):
            Masks.from_counts(counts, GRID, 2)

    def test_scores_of_numpy(self):
        scores = np.arange(14)[::-1].astype(np.float32)
        wanted = Masks.from_counts([5, 3], GRID, 2, scores=torch.arange(13.0, -1, -1))
        for given in (scores.copy(), scores.tolist(), scores.astype(int).copy()):
            got = Masks.from_counts([5, 3], GRID, 2, scores=given)
            assert torch.equal(got.keep, wanted.keep)
        assert scores[0] == 13

    @pytest.mark.parametrize("make", [Masks.dense, Masks.uniform, Masks.from_counts])
    def test_grids_of_no_whole_numbers(self, make):
        counts = {Masks.dense: (2,), Masks.uniform: (2, 0.5), Masks.from_counts: ([5, 3],)}[make]
        for grid in ((3.0, 4.0), 12, None):
            with pytest.raises(MasksError, match="grid must be two positive whole numbers, got"):
                make(*counts, grid, 2)
        with pytest.raises(MasksError, match="prefix must be a whole number, got 1.5"):
            make(*counts, GRID, 1.5)

    def test_scores_refused(self):
        with pytest.raises(MasksError, match="scores must be numbers, got str"):
            Masks.from_counts([5], GRID, 2, scores="best")
        with pytest.raises(MasksError, match=r"\[N\] = \[14\], got \[12\]"):
            Masks.from_counts([5], GRID, 2, scores=torch.zeros(12))
        with pytest.raises(MasksError, match="1 are NaN"):
            Masks.from_counts([5], GRID, 2, scores=torch.tensor([float("nan")] + [0.0] * 13))

    def test_uniform(self):
        masks = Masks.uniform(4, 0.5, GRID, 2, head_tokens=2, semantics="idle", model="m")
        assert masks.counts == (8, 8, 8, 2)
        assert (masks.semantics, masks.model) == ("idle", "m")
        assert Masks.uniform(1, 0.5, GRID, 1).counts == (1,)
        assert Masks.uniform(3, 0, GRID, 3, head_tokens=1).counts == (3, 3, 1)
        assert Masks.uniform(3, 1, GRID, 1).counts == (13, 13, 1)

    @pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
    def test_uniform_refused(self, ratio):
        with pytest.raises(
            MasksError, match="keep_ratio must be finite, at least 0 and at most 1, got"
        ):
            Masks.uniform(4, ratio, GRID)

    @pytest.mark.parametrize("given", ["1", 1.0, 0])
    def test_head_tokens_refused(self, given):
        with pytest.raises(MasksError, match="head_tokens must be .*, got"):
            Masks.uniform(4, 0.5, GRID, head_tokens=given)

    def test_depth_refused(self):
        with pytest.raises(MasksError, match="depth must be at least 1, got 0"):
            Masks.uniform(0, 0.5, GRID)

    def test_dense(self):
        masks = Masks.dense(2, GRID, 3, semantics="zero")
        assert masks.keep.all()
        assert (masks.counts, masks.semantics) == ((15, 15), "zero")

    @pytest.mark.parametrize("grid", [(1, 1), (1, 7), (14, 14), (37, 37)])
    def test_even_spread(self, grid):
        ranking = even_spread(grid)
        assert ranking.sort().values.tolist() == list(range(grid[0] * grid[1]))

    def test_even_spread_covers_the_image(self):
        first = even_spread((14, 14))[:49]
        quarters = first // 14 // 7 * 2 + first % 14 // 7
        assert quarters.bincount(minlength=4).min() >= 10


class TestEquality:
    def test_what_is_made_alike_is_equal(self):
        one, other = full(), full()
        assert one == other
        assert hash(one) == hash(other)
        assert len({one, other}) == 1

    @pytest.mark.parametrize(
        "change",
        [
            {"keep": Masks.from_counts([11, 8, 7, 3], GRID, prefix=2).keep},
            {"semantics": "idle"},
            {"model": "vit_tiny_patch16_224"},
            {"image_size": None},
            {"tolerance": 0.5},
            {"scores": None},
            {"scores": torch.zeros(4, 14)},
            {"errors": torch.tensor([0.1, 0.2, 0.3, 0.5])},
            {"data": ""},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_every_attribute_counts(self, change):
        assert full() != full().replace(**change)
        assert full().replace(**change) != full()

    def test_of_another_shape_or_kind(self):
        assert example() != Masks.from_counts([11, 8, 8], GRID, prefix=2)
        assert example() != "masks"
