"""apply_masks against timm's own blocks on all tokens, and what it refuses."""

import copy

import pytest
import torch
from references import (
    MODELS,
    build,
    off,
    random_images,
    random_masks,
    randomise,
    reference_features,
)
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import nn

from slimvit.errors import PlanError, SlimvitError, UnsupportedModelError, UsageError
from slimvit.masks import SEMANTICS, Masks
from slimvit.models import spec
from slimvit.runtime import apply_masks

EXACT = 1e-11
FLOAT32 = 1e-5


def dense_masks(model: nn.Module, semantics: str = "drop") -> Masks:
    read = spec(model)
    return Masks.dense(read.depth, read.grid, read.prefix, semantics=semantics)


def slim_pair(
    name: str = "deit", semantics: str = "drop", dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[nn.Module, nn.Module]:
    model = build(name).to(dtype)
    return model, apply_masks(model, random_masks(model, semantics, seed))


class TestDenseMasks:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("semantics", SEMANTICS)
    def test_answers_like_timm(self, name, semantics):
        model = build(name)
        images = random_images(model, 3)
        slim = apply_masks(model, dense_masks(model, semantics))
        with torch.no_grad():
            assert off(slim(images), model(images)) < FLOAT32
            features = model.forward_features(images)
            assert off(slim.forward_features(images), features) < FLOAT32
            assert off(slim.forward_head(features), model.forward_head(features)) < FLOAT32
            pre_logits = model.forward_head(features, pre_logits=True)
            assert off(slim.forward_head(features, pre_logits=True), pre_logits) < FLOAT32

    @pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_tiny_patch16_224"])
    def test_real(self, real, name):
        from slimvit.models import create

        model = create(name, checkpoint=real / f"{name}.safetensors")
        images = random_images(model, 1)
        with torch.no_grad():
            slim = apply_masks(model, dense_masks(model))
            assert off(slim(images), model(images)) < FLOAT32


class TestSemantics:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("semantics", SEMANTICS)
    @pytest.mark.parametrize("seed", [0, 1])
    def test_equals_timms_blocks(self, poison_empty, name, semantics, seed):
        model, slim = slim_pair(name, semantics, seed=seed)
        images = random_images(model, 3, seed)
        features = reference_features(model, images, slim.masks)
        with torch.no_grad():
            assert off(slim.forward_features(images), features) < EXACT
            assert off(slim(images), model.forward_head(features)) < EXACT

    @pytest.mark.parametrize("semantics", SEMANTICS)
    def test_float32_errs_no_more_than_timm(self, semantics):
        model, slim = slim_pair("deit3", semantics, torch.float32)
        images = random_images(model, 3)
        exact = reference_features(copy.deepcopy(model).double(), images.double(), slim.masks)
        timms = off(reference_features(model, images, slim.masks), exact)
        with torch.no_grad():
            assert off(slim.forward_features(images), exact) < 2 * timms

    def test_they_differ(self):
        model = build("deit").double()
        images = random_images(model, 2)
        answers = []
        with torch.no_grad():
            for semantics in SEMANTICS:
                answers.append(apply_masks(model, random_masks(model, semantics))(images))
        answers.append(model(images))
        for index, one in enumerate(answers):
            for other in answers[index + 1 :]:
                assert off(one, other) > 1e-2

    @pytest.mark.parametrize("name", ["deit", "deit_distilled", "dinov2_reg4", "fc_norm"])
    def test_last_block_with_the_heads_tokens_alone_loses_nothing(self, name):
        model = build(name).double()
        read = spec(model)
        counts = [read.tokens] * (read.depth - 1) + [read.head_tokens]
        images = random_images(model, 3)
        for semantics in SEMANTICS:
            masks = Masks.from_counts(counts, read.grid, read.prefix, semantics=semantics)
            with torch.no_grad():
                assert off(apply_masks(model, masks)(images), model(images)) < EXACT

    @pytest.mark.parametrize("batch", [0, 1, 5])
    def test_images_are_independent(self, batch):
        model, slim = slim_pair("deit_distilled", "zero")
        images = random_images(model, 5)
        with torch.no_grad():
            together, part = slim(images), slim(images[:batch])
        assert part.shape == (batch, 7)
        assert batch == 0 or off(part, together[:batch]) < EXACT

    def test_prefix_tokens_are_kept_alone(self):
        model = build("dinov2_reg4").double()
        masks = Masks.from_counts([5, 5, 1], (4, 4), 5)
        images = random_images(model, 2)
        features = reference_features(model, images, masks)
        with torch.no_grad():
            assert off(apply_masks(model, masks).forward_features(images), features) < EXACT


class TestFeatures:
    @pytest.mark.parametrize("semantics", ["drop", "zero"])
    def test_zero_elsewhere(self, semantics):
        model, slim = slim_pair("dinov2_reg4", semantics)
        with torch.no_grad():
            features = slim.forward_features(random_images(model, 2))
        last = slim.masks.keep[-1]
        assert features.shape == (2, slim.masks.tokens, 48)
        assert (features[:, ~last] == 0).all()
        assert (features[:, last] != 0).all()

    def test_last_value_where_idle(self):
        model, slim = slim_pair("deit", "idle")
        with torch.no_grad():
            features = slim.forward_features(random_images(model, 2))
        assert (features != 0).all()

    @pytest.mark.parametrize("name", ["deit", "deit_distilled", "fc_norm", "no_classes"])
    @pytest.mark.parametrize("semantics", SEMANTICS)
    def test_forward_is_head_of_features(self, name, semantics):
        model, slim = slim_pair(name, semantics)
        images = random_images(model, 2)
        with torch.no_grad():
            assert off(slim(images), slim.forward_head(slim.forward_features(images))) < EXACT


class TestGivenModel:
    @pytest.mark.parametrize("training", [False, True])
    def test_is_never_changed(self, training):
        model = build("deit3").train(training)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        attributes, modules = set(vars(model)), [id(module) for module in model.modules()]
        kind = type(model)
        slim = apply_masks(model, random_masks(model, "zero"))
        with torch.no_grad():
            slim.head.weight.add_(1)
        slim(random_images(model, 1)).sum().backward()
        assert type(model) is kind is VisionTransformer
        assert model.training == training == slim.training
        assert set(vars(model)) == attributes
        assert [id(module) for module in model.modules()] == modules
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_result_is_of_its_class(self):
        for name in ("deit", "deit_distilled"):
            model, slim = slim_pair(name)
            assert isinstance(slim, type(model))
            assert type(slim).__name__ == f"Slim{type(model).__name__}"
            assert slim.num_classes == 7

    def test_masks_given_as_a_path(self, tmp_path):
        model = build("deit")
        masks = random_masks(model, "zero")
        masks.save(tmp_path / "m.safetensors")
        images = random_images(model, 1)
        for path in (tmp_path / "m.safetensors", str(tmp_path / "m.safetensors")):
            slim = apply_masks(model, path)
            assert torch.equal(slim(images), apply_masks(model, masks)(images))
            assert slim.masks.counts == masks.counts

    def test_missing_masks_file(self, tmp_path):
        with pytest.raises(PlanError, match="not found"):
            apply_masks(build("deit"), tmp_path / "none.safetensors")


class TestRefused:
    @pytest.mark.parametrize("call", ["forward", "forward_features"])
    @pytest.mark.parametrize("name", ["deit", "dynamic_img_size"])
    def test_wrong_images(self, call, name):
        _, slim = slim_pair(name, dtype=torch.float32)
        for shape in [(1, 3, 48, 64), (1, 1, 64, 64), (3, 64, 64)]:
            with pytest.raises(SlimvitError, match=r"images must be \[B, 3, 64, 64\], got"):
                getattr(slim, call)(torch.zeros(shape))

    @pytest.mark.parametrize("call", ["forward", "forward_features"])
    @pytest.mark.parametrize("option", [{"attn_mask": torch.ones(17, 17)}, {"is_causal": True}])
    def test_attention_masks(self, call, option):
        model, slim = slim_pair(dtype=torch.float32)
        with pytest.raises(UnsupportedModelError, match="takes no attn_mask and is not causal"):
            getattr(slim, call)(random_images(model, 1), **option)

    @pytest.mark.parametrize(
        "call", ["forward_intermediates", "get_intermediate_layers", "prune_intermediate_layers"]
    )
    def test_intermediates(self, call):
        model, slim = slim_pair(dtype=torch.float32)
        with pytest.raises(UnsupportedModelError, match="no intermediate features"):
            getattr(slim, call)(random_images(model, 1))

    def test_another_input_size(self):
        _, slim = slim_pair()
        with pytest.raises(UnsupportedModelError, match="belongs to one image size"):
            slim.set_input_size(img_size=96)


def test_odd_sizes():
    """N = 197, 63 and 257, as the small models above have none."""
    for size, patch in (((224, 224), 16), ((62, 1), 1), ((16, 16), 1)):
        model = randomise(
            VisionTransformer(
                img_size=size, patch_size=patch, embed_dim=16, depth=2, num_heads=1, num_classes=3
            )
        )
        model = model.double().eval()
        images = random_images(model, 1)
        for semantics in SEMANTICS:
            masks = random_masks(model, semantics)
            features = reference_features(model, images, masks)
            with torch.no_grad():
                got = apply_masks(model, masks).forward_features(images)
            assert off(got, features) < EXACT


def test_timms_weight_decay_groups_and_classifier():
    model, slim = slim_pair("deit_distilled")
    assert slim.no_weight_decay() == model.no_weight_decay()
    assert slim.get_classifier() == (slim.head, slim.head_dist)
    groups = [
        [len(group["params"]) for group in param_groups_weight_decay(either)]
        for either in (model, slim)
    ]
    assert groups[0] == groups[1]


@pytest.mark.parametrize("wrong", [None, {}, Masks, [[True]]], ids=str)
def test_what_is_no_masks_is_refused(wrong):
    with pytest.raises(UsageError, match="masks must be Masks, a Planner or a file of either, got"):
        apply_masks(build("deit"), wrong)
