"""Fine-tuning of blocks in the search."""

from types import SimpleNamespace

import pytest
import torch
from test_search import quick

from slimvit.errors import SlimvitError
from slimvit.search.tune import BlockTuner


def test_block_fine_tuning_lowers_the_error(tiny_vit, batches):
    counts = (9, 9, 9, 9, 9, 1)
    plain = quick(tiny_vit, batches, counts=counts)
    tuned = quick(tiny_vit, batches, counts=counts, epochs=8, lr=1e-3)
    assert plain.model is None
    assert tuned.masks.errors[-2] < 0.9 * plain.masks.errors[-2]
    changed = [
        name
        for name, value in tuned.model.state_dict().items()
        if not torch.equal(value, tiny_vit.state_dict()[name])
    ]
    assert changed
    assert all(name.startswith("blocks.") for name in changed)
    assert not any(name.startswith("blocks.5.") for name in changed)


def test_diverged_fine_tuning_is_an_error(tiny_vit, batches):
    with pytest.raises(SlimvitError, match="diverged"):
        quick(tiny_vit, batches, counts=(9, 9, 9, 9, 9, 1), epochs=3, lr=1e30)


def test_block_fine_tuning_of_float16_is_refused(tiny_vit):
    with pytest.raises(SlimvitError, match="needs a float32 or bfloat16 model, got float16"):
        quick(tiny_vit.half(), [torch.randn(2, 3, 64, 64).half()], tolerance=0.02, epochs=1)


def test_blocks_within_the_tolerance_are_left_alone(tiny_vit, batches):
    tuned = quick(tiny_vit, batches, tolerance=60.0, epochs=1).model.state_dict()
    for name, value in tiny_vit.state_dict().items():
        assert torch.equal(tuned[name], value), name


def test_gradients_are_clipped():
    weight = torch.nn.Parameter(torch.ones(4))
    steep = SimpleNamespace(index=1, relative_error=lambda *_: 1e3 * weight.square())
    BlockTuner(steep, [weight], lr=1e-3, seed=0).epochs(SimpleNamespace(batches=1), 1, 1)
    torch.testing.assert_close(weight.grad.norm(), torch.tensor(1.0))
