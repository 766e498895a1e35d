"""The feature cache: bounded memory, the same tensors back, clear errors."""

import os

import pytest
import torch

from slimvit.errors import DataError, SlimvitError
from slimvit.search.features import Features, TensorStore
from slimvit.search.reduce import ExactMean


@pytest.mark.parametrize("limit", [0, 300, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_store_gives_back_what_was_put(limit, dtype, tmp_path):
    torch.manual_seed(0)
    store = TensorStore(limit, str(tmp_path))
    values = {i: torch.randn(i + 1, 5).to(dtype) for i in range(6)}
    for key, value in values.items():
        store.put(key, value)
    values[2] = torch.randn(9, 3).to(dtype)
    store.put(2, values[2])
    for key, value in values.items():
        assert torch.equal(store.get(key), value)
    store.close()
    assert os.listdir(tmp_path) == []


def test_store_copies(tmp_path):
    store = TensorStore(1 << 20, str(tmp_path))
    value = torch.zeros(3)
    store.put("a", value)
    value.add_(1)
    assert store.get("a").sum() == 0


def test_store_holds_no_more_than_its_limit_in_memory(tmp_path):
    store = TensorStore(1 << 16, str(tmp_path))
    for i in range(64):
        store.put(i, torch.zeros(1 << 12))
    assert sum(t.nbytes for t in store._memory.values()) <= 1 << 16
    on_disk = sum(f.stat().st_size for f in tmp_path.rglob("*.bin"))
    assert on_disk == 60 * (1 << 14)
    store.put(0, torch.zeros(1))  # room that is freed is used again
    store.put("new", torch.zeros(1 << 10))
    assert "new" in store._memory


def test_full_disk_names_the_folder(tmp_path):
    store = TensorStore(0, str(tmp_path))
    os.symlink("/dev/full", os.path.join(store._folder.name, "0.bin"))
    with pytest.raises(SlimvitError, match=rf"do not fit into {tmp_path}"):
        store.put("a", torch.zeros(1 << 20))


def test_features_are_those_of_the_model(tiny_vit):
    images = torch.randn(3, 3, 64, 64)
    features = Features(tiny_vit, [images], cache_bytes=0, progress=False)
    x = tiny_vit.norm_pre(tiny_vit._pos_embed(tiny_vit.patch_embed(images)))
    for layer, block in enumerate(tiny_vit.blocks, start=1):
        x = block(x)
        torch.testing.assert_close(features.at(layer, 0).transpose(0, 1), x)


def test_fingerprint_knows_images_not_batches(tiny_vit):
    images = torch.randn(4, 3, 64, 64)

    def fingerprint(batches):
        return Features(tiny_vit, batches, cache_bytes=1 << 20, progress=False).fingerprint

    whole = fingerprint([images])
    assert whole == fingerprint([images[2:], images[:2]])
    assert whole != fingerprint([images[:3]])
    assert whole != fingerprint([images * 1.0001])


@pytest.mark.parametrize("sizes", [[2, 7, 3], [100] * 4])
def test_counts_images_and_the_largest_batch(tiny_vit, sizes):
    """The digests of 400 images sum to more than 62 bits hold."""
    images = torch.randn(sum(sizes), 3, 64, 64).split(sizes)
    features = Features(tiny_vit, images, cache_bytes=1 << 30, progress=False)
    assert features.batch_size == max(sizes)
    assert features.fingerprint.startswith(f"{sum(sizes)} images, ")


def test_no_images_is_an_error(tiny_vit):
    with pytest.raises(DataError, match="no calibration images"):
        Features(tiny_vit, [], cache_bytes=1 << 20, progress=False)


def test_not_finite_features_name_the_block_and_batch(tiny_vit):
    batches = poisoned_second(tiny_vit, [torch.randn(1, 3, 64, 64)] * 2)
    with pytest.raises(SlimvitError, match="block 3 gives NaN or infinity on calibration batch 2"):
        Features(tiny_vit, batches, cache_bytes=1 << 20, progress=False)


def poisoned_second(model, batches):
    """Batches, with a weight of block 3 turned NaN after the first."""
    for batch in batches:
        yield batch
        with torch.no_grad():
            model.blocks[2].mlp.fc2.bias[0] = float("nan")


def test_mean_is_exact_in_any_order():
    torch.manual_seed(0)
    values = torch.rand(1000, 3)
    forward, backward = ExactMean(3), ExactMean(3)
    for part in values.split(7):
        forward.add(part)
    for part in values.flip(0).split(11):
        backward.add(part)
    assert torch.equal(forward.mean(), backward.mean())
    torch.testing.assert_close(forward.mean(), values.double().mean(0), rtol=0, atol=1e-11)
