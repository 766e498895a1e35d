"""Options of the search: what is refused, and numbers of other kinds than Python's own."""

import numpy as np
import pytest
import torch
from test_search import quick

import slimvit
from slimvit.errors import SlimvitError, UnsupportedModelError, UsageError
from slimvit.models import spec
from slimvit.search import fit_absorb, fit_dps, fit_thresholds


@pytest.fixture
def batches() -> list[torch.Tensor]:
    torch.manual_seed(3)
    return list(torch.randn(6, 3, 64, 64).split(3))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tolerance": 0.0}, "tolerance must be finite and above 0, got 0.0"),
        ({"tolerance": float("nan")}, "tolerance must be finite and above 0, got nan"),
        ({}, "exactly one of tolerance, cut, speedup and counts, got none"),
        ({"tolerance": 0.1, "cut": 0.5}, "got tolerance and cut"),
        ({"cut": 1.0}, "cut must be finite, above 0 and below 1, got 1.0"),
        ({"speedup": 1.0}, "speedup must be finite and above 1"),
        ({"tolerance": 0.1, "granularity": 0}, "granularity must be at least 1, got 0"),
        ({"tolerance": 0.1, "epochs": -1}, "epochs must be at least 0, got -1"),
        ({"tolerance": 0.1, "lr": 0.0}, "lr must be finite and above 0"),
        ({"tolerance": 0.1, "score": "best"}, "score must be one of eq6, attention, random"),
        ({"tolerance": 0.1, "score": 3}, "score must be one of eq6, attention, random, got 3"),
        ({"tolerance": 0.1, "semantics": "gone"}, "semantics must be one of drop, zero, idle"),
        ({"tolerance": 0.1, "uniform": True}, "uniform needs a cut"),
        ({"counts": (5, 4)}, "counts must be one for each of 6 blocks, got 2"),
        ({"counts": (5, 6, 5, 5, 5, 1)}, "must not grow with depth"),
        ({"counts": [10] * 6}, "counts must end with 1, what the head reads .*, got 10"),
        ({"counts": [9.5, 9, 9, 9, 9, 1]}, "each of counts must be a whole number, got 9.5"),
        ({"counts": np.array([9.5, 9, 9, 9, 9, 1])}, "each of counts must be a whole number"),
        ({"counts": 5}, "counts must be whole numbers in a list, got 5"),
        ({"counts": [1.5]}, "each of counts must be a whole number, got 1.5"),
        (
            {"tolerance": 0.1, "score": "random", "seed": 2**70},
            "seed must lie between .*, got 1180",
        ),
        ({"tolerance": 0.1, "cache_bytes": "1"}, "cache_bytes must be a whole number, got '1'"),
        ({"tolerance": 0.1, "cache_dir": "missing"}, "cache_dir must be a folder .* got 'missing'"),
        ({"tolerance": 0.1, "cache_dir": 5}, "cache_dir must be a folder .* got 5"),
        ({"tolerance": "much"}, "tolerance must be a number, got 'much'"),
        ({"tolerance": 0.1, "epochs": 1.5}, "epochs must be a whole number, got 1.5"),
        ({"tolerance": 0.1, "cache_bytes": -1}, "cache_bytes must be at least 0, got -1"),
    ],
)
def test_bad_options_are_named(tiny_vit, batches, options, message):
    with pytest.raises(UsageError if "grow" not in message else SlimvitError, match=message):
        quick(tiny_vit, batches, **options)


@pytest.mark.parametrize("seed", [2**53, -(2**53)])
def test_the_largest_seeds(tiny_vit, batches, seed):
    options = {"counts": (12, 12, 9, 9, 5, 1), "score": "random", "epochs": 1, "seed": seed}
    assert quick(tiny_vit, batches[:1], **options).masks.counts == options["counts"]


def test_usage_errors_are_usage_errors(tiny_vit, batches):
    with pytest.raises(UsageError):
        quick(tiny_vit, batches, tolerance=-1)
    with pytest.raises(UnsupportedModelError):
        quick(torch.nn.Linear(2, 2), batches, tolerance=0.1)


@pytest.mark.parametrize(
    "options, plain",
    [
        ({"tolerance": np.float32(0.02)}, {"tolerance": float(np.float32(0.02))}),
        ({"cut": torch.tensor(0.25)}, {"cut": 0.25}),
        ({"counts": np.array([12, 12, 9, 9, 5, 1])}, {"counts": (12, 12, 9, 9, 5, 1)}),
        (
            {"counts": torch.tensor([12, 12, 9, 9, 5, 1]), "seed": np.int64(3), "score": "random"},
            {"counts": (12, 12, 9, 9, 5, 1), "seed": 3, "score": "random"},
        ),
    ],
)
def test_numbers_of_numpy_and_torch(tiny_vit, batches, tmp_path, options, plain):
    masks = quick(tiny_vit, batches, state=tmp_path / "state", **options).masks
    assert torch.equal(masks.keep, quick(tiny_vit, batches, **plain).masks.keep)


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        ({"image": torch.zeros(2, 3, 64, 64)}, "got dict"),
        ((np.zeros((2, 3, 64, 64)), 0), "got tuple that begins with ndarray"),
        ([], "got list"),
    ],
)
def test_batches_of_another_kind_are_named(tiny_vit, batch, got):
    with pytest.raises(UsageError, match=r"batches must be images \[b, C, H, W\] or .*" + got):
        quick(tiny_vit, [batch], tolerance=0.1)


def test_images_of_integers_have_not_been_normalised(tiny_vit):
    images = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    with pytest.raises(SlimvitError, match="images must be floating point, got uint8"):
        quick(tiny_vit, [images], tolerance=0.1)


CALLS = {
    "prune": lambda model, loader: slimvit.prune(model, loader, tolerance=0.1, progress=False),
    "fit_dps": lambda model, loader: fit_dps(
        model, loader, (12, 12, 9, 9, 5, 1), epochs=1, progress=False
    ),
    "fit_absorb": lambda model, loader: fit_absorb(model, loader, cut=0.3, progress=False),
    "fit_thresholds": lambda model, loader: fit_thresholds(
        model, slimvit.Absorb(cut=0.3), loader, progress=False
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_loader(tiny_vit, call):
    for loader in (tiny_vit, None):
        if loader is None and call == "fit_absorb":
            continue  # which needs none
        with pytest.raises(UsageError, match="loader must give batches one by one, got "):
            CALLS[call](tiny_vit, loader)


@pytest.mark.parametrize("call", CALLS)
def test_images_with_the_negative_bit(tiny_vit, batches, call):
    CALLS[call](tiny_vit, [torch._neg_view(batches[0])])


@pytest.mark.parametrize("call", [name for name in CALLS if name != "fit_dps"])
def test_what_trains_nothing_works_in_inference_mode(tiny_vit, batches, call):
    with torch.inference_mode():
        CALLS[call](tiny_vit, batches[:1])


@pytest.mark.parametrize("call", ["search", "fit_dps"])
def test_what_trains_is_refused_in_inference_mode(tiny_vit, call):
    with torch.inference_mode(), pytest.raises(UsageError, match="outside torch.inference_mode"):
        if call == "search":
            quick(tiny_vit, None, tolerance=0.1, epochs=1)
        else:
            CALLS[call](tiny_vit, None)


def text_of(found):
    """Every number of masks, or of a plan and its report."""
    if isinstance(found, slimvit.Masks):
        return f"{found.errors.tolist()} {found.scores.tolist()}"
    plan, report = found if isinstance(found, tuple) else (found, ())
    return f"{plan.settings()} {[value.tolist() for value in plan.parameters()]} {report}"


@pytest.mark.parametrize("call", CALLS)
def test_computes_in_the_models_precision(tiny_vit, batches, call):
    wanted = text_of(CALLS[call](tiny_vit, batches))
    with torch.autocast("cpu", torch.bfloat16):
        assert text_of(CALLS[call](tiny_vit, batches)) == wanted


@pytest.fixture
def double_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_default_dtype_has_no_say(tiny_vit, batches, request):
    shape, options = spec(tiny_vit), {"counts": (12, 12, 9, 9, 5, 1), "score": "random"}

    def found():
        plans = [slimvit.DPS(options["counts"]).bind(shape), slimvit.SPViT().bind(shape)]
        plans.append(CALLS["fit_dps"](tiny_vit, batches)[0])
        weights = [value for plan in plans for value in plan.state_dict().values()]
        return [*weights, quick(tiny_vit, batches, **options).masks.scores]

    wanted = found()
    request.getfixturevalue("double_by_default")
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found(), wanted))
