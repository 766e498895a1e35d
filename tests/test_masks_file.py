"""The file of masks, and files that are none."""

import errno
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_masks import GRID, example, full

from slimvit.errors import MasksError
from slimvit.masks import SEMANTICS, Masks


class TestFile:
    def test_round_trip(self, tmp_path):
        masks = full()
        masks.save(tmp_path / "m.safetensors")
        loaded = Masks.load(str(tmp_path / "m.safetensors"))
        for name in ("prefix", "grid", "semantics", "model", "image_size", "tolerance", "data"):
            assert getattr(loaded, name) == getattr(masks, name)
        for name in ("keep", "scores", "errors"):
            assert torch.equal(getattr(loaded, name), getattr(masks, name))

    def test_the_same_masks_are_the_same_bytes(self, tmp_path):
        path, found = tmp_path / "m.safetensors", set()
        for _ in range(9):
            full().save(path)
            found.add(path.read_bytes())
        assert len(found) == 1

    @pytest.mark.parametrize("semantics", SEMANTICS)
    def test_round_trip_of_the_least(self, tmp_path, semantics):
        example(semantics=semantics).save(tmp_path / "m.safetensors")
        loaded = Masks.load(tmp_path / "m.safetensors")
        assert loaded.semantics == semantics
        assert (loaded.model, loaded.data) == ("", "")
        for name in ("image_size", "tolerance", "scores", "errors"):
            assert getattr(loaded, name) is None

    def test_scores_that_still_have_a_gradient(self, tmp_path):
        masks = full(scores=torch.rand(14, 4, dtype=torch.float64).t().requires_grad_())
        masks.save(tmp_path / "m.safetensors")
        assert torch.equal(Masks.load(tmp_path / "m.safetensors").scores, masks.scores.float())

    def test_what_others_read(self, tmp_path):
        full().save(tmp_path / "m.safetensors")
        with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
            assert set(file.keys()) == {"keep", "scores", "errors"}
            assert file.get_tensor("keep").dtype == torch.bool
            metadata = file.metadata()
        assert metadata["format"] == "slimvit-masks"
        assert metadata["version"] == "1"
        assert json.loads(metadata["image_size"]) == [48, 64]
        assert json.loads(metadata["grid"]) == [3, 4]

    def test_save_replaces(self, tmp_path):
        path = tmp_path / "m.safetensors"
        Masks.dense(2, GRID).save(path)
        full().save(path)
        assert Masks.load(path).counts == (11, 8, 8, 3)
        assert os.listdir(tmp_path) == ["m.safetensors"]

    def test_full_disk(self, tmp_path, monkeypatch):
        path = tmp_path / "m.safetensors"
        full().save(path)

        def no_space(handle):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match=r"No space left on device: .*m\.safetensors"):
            Masks.dense(2, GRID).save(path)
        monkeypatch.undo()
        assert Masks.load(path).counts == (11, 8, 8, 3)
        assert os.listdir(tmp_path) == ["m.safetensors"]


class TestBadFile:
    def refused(self, path, message: str) -> None:
        with pytest.raises(MasksError) as caught:
            Masks.load(path)
        assert message in str(caught.value)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def written(self, tmp_path, without: str = "", keep: torch.Tensor | None = None, **changes):
        """The file of `full`, with other metadata or another `keep`."""
        masks = full()
        masks.save(tmp_path / "good.safetensors")
        with safe_open(tmp_path / "good.safetensors", framework="pt") as file:
            metadata = {**file.metadata(), **changes}
        metadata.pop(without, None)
        path = tmp_path / "bad.safetensors"
        save_file({"keep": masks.keep if keep is None else keep}, path, metadata)
        return path

    def test_missing(self, tmp_path):
        self.refused(tmp_path / "none.safetensors", "masks file not found")
        self.refused(tmp_path, "masks file is a folder")

    @pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -300, -1])
    def test_truncated(self, tmp_path, length):
        path = tmp_path / "m.safetensors"
        full().save(path)
        path.write_bytes(path.read_bytes()[:length])
        self.refused(path, "is not a readable safetensors file")

    @pytest.mark.parametrize("content", [b"PK\x03\x04" * 100, b"\xff" * 64, b'{"keep": []}' * 9])
    def test_not_safetensors(self, tmp_path, content):
        path = tmp_path / "m.safetensors"
        path.write_bytes(content)
        self.refused(path, "is not a readable safetensors file")

    def test_unreadable(self, tmp_path, monkeypatch):
        def denied(*args, **kwargs):
            raise PermissionError(errno.EACCES, "Permission denied")

        path = self.written(tmp_path)
        monkeypatch.setattr("slimvit.masks._file.safe_open", denied)
        self.refused(path, "Permission denied")

    def test_weights_instead(self, tmp_path):
        path = tmp_path / "weights.safetensors"
        save_file({"head.weight": torch.ones(2, 2)}, path)
        self.refused(path, "metadata 'format' must be 'slimvit-masks', got None")

    def test_no_keep(self, tmp_path):
        path = tmp_path / "m.safetensors"
        save_file({"kept": torch.ones(2)}, path, {"format": "slimvit-masks", "version": "1"})
        self.refused(path, "lacks the tensor 'keep'")

    def test_unknown_tensor(self, tmp_path):
        path = tmp_path / "m.safetensors"
        tensors = {"keep": torch.ones(2, dtype=torch.bool), "bias": torch.ones(2)}
        save_file(tensors, path, {"format": "slimvit-masks", "version": "1"})
        self.refused(path, "unknown tensors: bias")

    def test_integer_scores(self, tmp_path):
        masks = full()
        masks.save(tmp_path / "good.safetensors")
        with safe_open(tmp_path / "good.safetensors", framework="pt") as file:
            metadata = file.metadata()
        path = tmp_path / "bad.safetensors"
        save_file({"keep": masks.keep, "scores": masks.keep.int()}, path, metadata)
        self.refused(path, "must be floating point, got torch.int32")

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("format", "pt", "'format' must be 'slimvit-masks', got 'pt'"),
            ("version", "2", "version '2', this slimvit reads version 1"),
            ("prefix", "two", "unreadable metadata"),
            ("prefix", "1", "tokens must be grid (3, 4) plus 1 prefix tokens"),
            ("grid", "[3, 4, 1]", "grid must be two positive whole numbers"),
            ("grid", "[3.5, 4]", "grid must be two positive whole numbers"),
            ("grid", "three", "unreadable metadata"),
            ("grid", "[4, 3", "unreadable metadata"),
            ("grid", "[2, 7]", "tokens must be grid (2, 7)"),
            ("image_size", "224", "image_size must be two positive whole numbers"),
            ("tolerance", "low", "unreadable metadata"),
            ("tolerance", "nan", "tolerance must be finite and above 0"),
            ("tolerance", "-0.02", "tolerance must be finite and above 0"),
            ("semantics", "gone", "semantics must be one of drop, zero, idle"),
        ],
    )
    def test_wrong_metadata(self, tmp_path, name, value, message):
        self.refused(self.written(tmp_path, **{name: value}), message)

    @pytest.mark.parametrize("name", ["prefix", "grid", "semantics", "model", "data"])
    def test_lacking_metadata(self, tmp_path, name):
        self.refused(self.written(tmp_path, without=name), f"lacks the metadata '{name}'")

    @pytest.mark.parametrize("name", ["format", "version"])
    def test_lacking_format(self, tmp_path, name):
        self.refused(self.written(tmp_path, without=name), "None")

    @pytest.mark.parametrize(
        ("cleared", "message"),
        [
            ((1, 9), "nested: block 3 keeps token 9, block 2 does not"),
            ((slice(1, None), 1), "prefix tokens must be kept: block 2 prunes token 1"),
            ((3, slice(None)), "the last keeps none"),
        ],
    )
    def test_wrong_masks(self, tmp_path, cleared, message):
        keep = torch.ones(4, 14, dtype=torch.bool)
        keep[cleared] = False
        self.refused(self.written(tmp_path, keep=keep), message)

    def test_keep_of_numbers(self, tmp_path):
        self.refused(self.written(tmp_path, keep=torch.ones(4, 14)), "got torch.float32 [4, 14]")
