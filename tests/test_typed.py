"""What editors and type checkers are told of the public calls."""

import importlib
import inspect
import typing

import pytest
import torch

import slimvit
from slimvit import search
from slimvit.dynamic import Absorb, View
from slimvit.errors import PlanError
from slimvit.masks import Masks
from slimvit.models import SlimmedViT
from slimvit.runtime import accelerate, apply_masks

MASKS = Masks.from_counts((9, 5, 5, 3, 2, 1), (4, 4))
PLANS = [MASKS, Absorb(counts=[12, 9, 6, 4, 3, 1])]


@pytest.mark.parametrize("name", sorted(slimvit._HOME))
def test_no_module_has_the_name_of_a_public_call(name):
    """A type checker that meets both in a cycle of imports takes the call for the module."""
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{slimvit._HOME[name]}.{name}")


@pytest.mark.parametrize(
    ("short", "whole"), [(search.prune, search.search), (search.train_dps, search.fit_dps)]
)
def test_a_shorter_call_tells_the_arguments_of_the_whole(short, whole):
    mine, theirs = inspect.signature(short), inspect.signature(whole)
    assert mine.parameters == theirs.parameters
    assert mine.return_annotation != theirs.return_annotation


@pytest.mark.parametrize("kept", PLANS, ids=["masks", "absorb"])
def test_a_slimmed_model_tells_what_it_keeps(tiny_vit, kept):
    slim = apply_masks(tiny_vit, kept).eval()
    assert isinstance(slim, SlimmedViT) and isinstance(slim, type(tiny_vit))
    assert typing.get_type_hints(apply_masks)["return"] is SlimmedViT
    static = isinstance(kept, Masks)
    assert (slim.masks == kept) == (slim.plan is None) == static
    assert slim.kept is (slim.masks if static else slim.plan)
    assert [places.shape for places in slim.kept_sets(torch.zeros(2, 3, 64, 64))] == [
        (2, n) for n in slim.kept.counts
    ]


def test_kept_sets_of_masks_are_their_rows(tiny_vit):
    images = torch.zeros(2, 3, 64, 64)
    for model in (apply_masks(tiny_vit, MASKS), accelerate(tiny_vit, MASKS, backend="torch")):
        for row, places in zip(MASKS.keep, model.kept_sets(images), strict=True):
            assert places.tolist() == [row.nonzero()[:, 0].tolist()] * 2


def test_kept_sets_of_masks_refuse_other_images(tiny_vit):
    with pytest.raises(slimvit.SlimvitError, match="64"):
        apply_masks(tiny_vit, MASKS).kept_sets(torch.zeros(2, 3, 32, 32))


def test_top_wants_a_number(tiny_vit):
    class Free(slimvit.Planner):
        kind = "free"
        ragged = True

        def count(self, layer: int, received: int) -> None:
            return None

        def choose(self, layer: int, view: View, n: int | None):
            return view.top(view.alive.place, n)

    slim = apply_masks(tiny_vit, Free((9, 5, 5, 3, 2, 1))).eval()
    with pytest.raises(PlanError, match="`count` gave None"):
        slim(torch.zeros(1, 3, 64, 64))
