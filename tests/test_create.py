"""Models by name, and weights from files."""

import sys

import pytest
import timm
import torch
from references import build
from safetensors.torch import load_file, save_file
from torch import nn

from slimvit.errors import CheckpointError, UsageError
from slimvit.models import create, load_checkpoint, spec

NAME = "test_vit"


def weights(img_size: int = 64, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return timm.create_model(NAME, img_size=img_size, num_classes=10).state_dict()


class TestCreate:
    def test_from_a_name(self):
        model = create(NAME, img_size=64, num_classes=10)
        assert not model.training
        assert spec(model).image_size == (64, 64)
        assert model.num_classes == 10

    @pytest.mark.parametrize("name", ["deit_tiny_patch16_223", "deit_tiny_patch16_223.fb_in1k"])
    def test_unknown_model(self, name):
        with pytest.raises(UsageError, match=r"unknown model .*near it: .*deit_tiny_patch16_224"):
            create(name)

    @pytest.mark.parametrize("name", ["", "qqqqqq", "../deit"])
    def test_unknown_model_like_none(self, name):
        with pytest.raises(UsageError, match="unknown model .*list_models"):
            create(name)

    def test_unknown_tag(self):
        with pytest.raises(UsageError, match="unknown weights 'fb' of deit_tiny.* timm has .*fb_i"):
            create("deit_tiny_patch16_224.fb")

    @pytest.mark.parametrize("img_size", [0, -16])
    def test_impossible_image_size(self, img_size):
        with pytest.raises(UsageError, match=f"img_size must be at least 1, got {img_size}"):
            create(NAME, img_size=img_size)

    def test_model_of_any_image_size(self):
        with pytest.raises(UsageError, match="model test_resnet does not take img_size=64"):
            create("test_resnet", img_size=64)

    @pytest.mark.parametrize("name", [NAME, "deit_tiny_patch16_224"])
    def test_no_network(self, name, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match=f"no pretrained weights for {name}") as caught:
            create(name, pretrained=True)
        assert "\n" not in str(caught.value)

    def test_no_weights_in_the_hub(self):
        with pytest.raises(CheckpointError, match="no pretrained weights for .*_36x1_224"):
            create("vit_small_patch16_36x1_224", pretrained=True)


class TestCheckpoint:
    def create(self, path, **options):
        return create(NAME, checkpoint=path, **{"img_size": 64, "num_classes": 10, **options})

    def saved(self, tmp_path, **changes):
        """A checkpoint with some tensors changed, or left out where the change is None."""
        state = {**weights(), **{key.replace("__", "."): value for key, value in changes.items()}}
        path = tmp_path / "weights.safetensors"
        save_file({key: value for key, value in state.items() if value is not None}, path)
        return path

    def refused(self, path, message, **options):
        with pytest.raises(CheckpointError) as caught:
            self.create(path, **options)
        assert message in str(caught.value)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_round_trip(self, tmp_path):
        model = self.create(str(self.saved(tmp_path)))
        for key, value in weights().items():
            assert torch.equal(model.state_dict()[key], value)

    def test_float16(self, tmp_path):
        path = tmp_path / "half.safetensors"
        save_file({key: value.half() for key, value in weights().items()}, path)
        model = self.create(path)
        for key, value in weights().items():
            assert model.state_dict()[key].dtype == torch.float32
            assert torch.equal(model.state_dict()[key], value.half().float())

    @pytest.mark.parametrize("wrap", [None, "model", "state_dict", "state_dict_ema"])
    def test_torch_file(self, tmp_path, wrap):
        torch.save(weights() if wrap is None else {wrap: weights(), "epoch": 3}, tmp_path / "w.pt")
        model = self.create(tmp_path / "w.pt")
        assert torch.equal(model.state_dict()["head.weight"], weights()["head.weight"])

    def test_position_embedding_of_another_grid(self, tmp_path):
        path = self.saved(tmp_path)
        model = self.create(path, img_size=96)
        assert model.pos_embed.shape == (1, 37, 64)
        assert torch.equal(model.pos_embed[:, :1], weights()["pos_embed"][:, :1])
        directly = self.create(path)
        directly.set_input_size(96)
        assert torch.allclose(model.pos_embed, directly.pos_embed)

    def test_missing(self, tmp_path):
        self.refused(tmp_path / "none.safetensors", "checkpoint not found")
        self.refused(tmp_path, "checkpoint not found")

    def test_missing_and_extra_keys(self, tmp_path):
        path = self.saved(tmp_path, norm__bias=None, norm__gamma=torch.ones(64))
        self.refused(path, "does not fit the model: 1 missing key (norm.bias), 1 extra key (norm.g")
        path = self.saved(tmp_path, **{f"blocks__{i}__norm1__bias": None for i in range(6)})
        self.refused(path, "6 missing keys (blocks.0.norm1.bias, blocks.1.norm1.bias, blocks.2.nor")
        self.refused(path, "and 3 more)")

    def test_other_model(self, tmp_path):
        path = tmp_path / "weights.safetensors"
        save_file(build("deit").state_dict(), path)
        with pytest.raises(CheckpointError, match=r"3 missing keys \(dist_token, head_dist"):
            load_checkpoint(build("deit_distilled"), path)

    def test_other_number_of_classes(self, tmp_path):
        message = "head.weight must be [11, 64], got [10, 64]"
        self.refused(self.saved(tmp_path), message, num_classes=11)

    @pytest.mark.parametrize("shape", [(1, 18, 64), (17, 64), (1,), (1, 17, 63)])
    def test_shapes(self, tmp_path, shape):
        path = self.saved(tmp_path, pos_embed=torch.ones(shape))
        self.refused(path, f"pos_embed must be [1, 17, 64], got {list(shape)}")

    @pytest.mark.parametrize("share", [0, 0.00001, 0.001, 0.5, 0.999])
    def test_truncated(self, tmp_path, share):
        path = self.saved(tmp_path)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        self.refused(path, "is not a readable checkpoint")

    @pytest.mark.parametrize("what", ["truncated", "text", "list", "tensor", "pickle"])
    def test_bad_torch_file(self, tmp_path, what):
        path = tmp_path / "w.pt"
        contents = {"list": [1, 2], "tensor": torch.ones(3), "pickle": {"model": nn.Linear(2, 2)}}
        torch.save(contents.get(what, weights()), path)
        if what == "truncated":
            path.write_bytes(path.read_bytes()[:-5000])
        if what == "text":
            path.write_text("hello")
        self.refused(path, "is not a readable checkpoint")

    def test_no_code_is_run_whatever_timm_does_by_itself(self, tmp_path, monkeypatch):
        asked, home = [], sys.modules[load_checkpoint.__module__]
        monkeypatch.setattr(
            home, "load_state_dict", lambda *_, **options: asked.append(options) or weights()
        )
        load_checkpoint(create(NAME, img_size=64, num_classes=10), self.saved(tmp_path))
        assert asked == [{"weights_only": True}]

    def test_not_a_tensor(self, tmp_path):
        torch.save({**weights(), "norm.bias": 3}, tmp_path / "w.pt")
        self.refused(tmp_path / "w.pt", "norm.bias must be [64], got int")

    def test_model_is_untouched_unless_all_fits(self, tmp_path):
        model = create(NAME, img_size=64, num_classes=11)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(CheckpointError):
            load_checkpoint(model, self.saved(tmp_path))
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    def test_real(self, real):
        path = real / "deit_tiny_patch16_224.safetensors"
        model = create("deit_tiny_patch16_224", checkpoint=path)
        for key, value in load_file(path).items():
            assert torch.equal(model.state_dict()[key], value.float())
