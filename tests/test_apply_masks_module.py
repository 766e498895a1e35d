"""What apply_masks returns is a module: moved, copied, trained, compiled and exported."""

import copy
import io
import pickle

import pytest
import torch
import torch.fx
from references import (
    MODELS,
    SMALL,
    build,
    off,
    random_images,
    random_masks,
    randomise,
    reference_features,
)
from test_apply_masks import EXACT, FLOAT32, slim_pair
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from tracing import check_compiled, check_exported

from slimvit.dynamic import Absorb
from slimvit.errors import SlimvitError, UnsupportedModelError
from slimvit.masks import SEMANTICS, Masks
from slimvit.runtime import accelerate, apply_masks


class TestModule:
    @pytest.mark.parametrize("name", ["deit3", "deit_distilled", "dinov2_reg4"])
    def test_state_dict_both_ways(self, name):
        model, slim = slim_pair(name)
        assert list(slim.state_dict()) == list(model.state_dict())
        other = randomise(MODELS[name](), seed=5).double()
        slim.load_state_dict(other.state_dict(), strict=True)
        images = random_images(model, 2)
        with torch.no_grad():
            assert torch.equal(slim(images), apply_masks(other, slim.masks).eval()(images))
        model.load_state_dict(slim.state_dict(), strict=True)
        assert torch.equal(model.head.weight, other.head.weight)

    @pytest.mark.parametrize("semantics", SEMANTICS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_moves(self, semantics, dtype):
        model, slim = slim_pair("deit3", semantics, torch.float32)
        images = random_images(model, 2)
        exact = model.double().forward_head(reference_features(model, images.double(), slim.masks))
        with torch.no_grad():
            got = slim.to(dtype)(images.to(dtype))
        assert got.dtype == dtype
        assert off(got, exact) < (1e-12 if dtype == torch.float64 else 0.05)

    def test_moves_to_another_device(self):
        model, slim = slim_pair(dtype=torch.float32)
        slim.to("meta")
        assert slim(random_images(model, 2).to("meta")).shape == (2, 7)

    @pytest.mark.parametrize("kind", ["static", "dynamic", "accelerated"])
    @pytest.mark.usefixtures("fresh_compiler")
    def test_copies_of_a_compiled_model_are_not(self, kind):
        model, slim = slim_pair(dtype=torch.float32)
        if kind == "dynamic":
            slim = apply_masks(model, Absorb(cut=0.2)).eval()
        if kind == "accelerated":
            slim = accelerate(model, slim.masks, backend="torch")
        images = random_images(model, 2)
        slim.compile(backend="eager")
        for twin in (copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
            with torch.no_grad():
                assert off(twin(images), slim(images)) < 1e-5
                if kind == "accelerated":  # its weights are packed
                    assert twin._compiled_call_impl is None
                    continue
                for parameter in twin.parameters():
                    parameter.zero_()
                assert not twin(images).any() and slim(images).any()

    def test_deepcopy_is_independent(self):
        model, slim = slim_pair("deit3", "zero")
        images = random_images(model, 2)
        with torch.no_grad():
            before = slim(images)
            twin = copy.deepcopy(slim)
            assert type(twin) is type(slim)
            assert torch.equal(twin(images), before)
            for parameter in twin.parameters():
                parameter.zero_()
            assert torch.equal(slim(images), before)

    @pytest.mark.parametrize("name", ["deit", "deit_distilled"])
    def test_pickle(self, name):
        model, slim = slim_pair(name, "idle")
        images = random_images(model, 2)
        with torch.no_grad():
            twin = pickle.loads(pickle.dumps(slim))
            assert type(twin) is type(slim)
            assert torch.equal(twin(images), slim(images))
            buffer = io.BytesIO()
            torch.save(slim, buffer)
            buffer.seek(0)
            assert torch.equal(torch.load(buffer, weights_only=False)(images), slim(images))

    def test_train_and_eval(self):
        model, slim = slim_pair()
        assert not slim.training
        assert slim.train() is slim
        assert all(module.training for module in slim.modules())
        assert not any(module.training for module in slim.eval().modules())

    def test_new_classifier(self):
        model, slim = slim_pair(dtype=torch.float32)
        slim.reset_classifier(3)
        assert slim(random_images(model, 2)).shape == (2, 3)
        slim.reset_classifier(0, "token")
        assert slim(random_images(model, 2)).shape == (2, 48)
        with pytest.raises(UnsupportedModelError, match="keeps global_pool='token', got 'avg'"):
            slim.reset_classifier(3, "avg")


class TestTraining:
    @pytest.mark.parametrize("name", sorted({"deit3", "deit_distilled", "gated"} & MODELS.keys()))
    @pytest.mark.parametrize("semantics", SEMANTICS)
    def test_gradients_reach_every_parameter(self, name, semantics):
        model, slim = slim_pair(name, semantics)
        slim.train()(random_images(model, 2)).square().sum().backward()
        for key, parameter in slim.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.abs().sum() > 0, key

    @pytest.mark.parametrize("semantics", SEMANTICS)
    def test_gradients_are_right(self, semantics):
        model = VisionTransformer(
            img_size=8, patch_size=4, embed_dim=4, depth=3, num_heads=2, num_classes=2
        )
        randomise(model).double()
        masks = Masks.from_counts([4, 3, 1], (2, 2), semantics=semantics)
        slim = apply_masks(model, masks)
        images = random_images(model, 1).requires_grad_()
        parameters = dict(slim.named_parameters())

        def run(images: Tensor, *values: Tensor) -> Tensor:
            given = dict(zip(parameters, values, strict=True))
            return torch.func.functional_call(slim, given, (images,))

        inputs = (images, *parameters.values())
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)

    @pytest.mark.parametrize("name", ["deit3", "qk_norm"])
    @pytest.mark.parametrize("semantics", SEMANTICS)
    def test_autocast_errs_no_more_than_timm(self, name, semantics):
        model, slim = slim_pair(name, semantics, torch.float32)
        images = random_images(model, 8)
        exact = reference_features(copy.deepcopy(model).double(), images.double(), slim.masks)
        with torch.autocast("cpu", torch.bfloat16):
            timms = off(reference_features(model, images, slim.masks), exact)
            features = slim.train().forward_features(images)
            features.float().square().sum().backward()
        assert off(features, exact) < 2 * timms
        assert all(parameter.grad.isfinite().all() for parameter in slim.blocks.parameters())

    @pytest.mark.parametrize("semantics", SEMANTICS)
    def test_checkpointing_has_the_same_gradients(self, semantics):
        model, slim = slim_pair("deit3", semantics)
        images = random_images(model, 2)
        gradients = []
        for enable in (False, True):
            slim.train().set_grad_checkpointing(enable)
            slim.zero_grad()
            slim(images).square().sum().backward()
            gradients.append([parameter.grad.clone() for parameter in slim.parameters()])
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))

    def test_drop_path_drops_whole_images(self):
        model = randomise(
            VisionTransformer(img_size=32, drop_path_rate=0.5, **{**SMALL, "depth": 2})
        ).double()
        masks = Masks.from_counts([4, 3], (2, 2))
        slim = apply_masks(model, masks).train()
        image = random_images(model, 1)
        torch.manual_seed(0)
        features = slim.forward_features(image.expand(64, -1, -1, -1))
        # Block 2 has two branches, each there (twice as strong) or not: four outcomes, no more.
        distinct = features.flatten(1).round(decimals=8).unique(dim=0)
        assert len(distinct) == 4
        with torch.no_grad():
            slim.eval()
            dense = reference_features(model.eval(), image, masks)
            assert off(slim.forward_features(image), dense) < EXACT
            assert len(slim(image.expand(8, -1, -1, -1)).round(decimals=8).unique(dim=0)) == 1

    @pytest.mark.parametrize("rate", ["proj_drop_rate", "attn_drop_rate", "pos_drop_rate"])
    def test_dropout_is_for_training(self, rate):
        model = randomise(VisionTransformer(img_size=32, **{rate: 0.5}, **SMALL)).double()
        slim = apply_masks(model, Masks.from_counts([4, 3, 1], (2, 2)))
        images = random_images(model, 2)
        with torch.no_grad():
            slim.train()
            assert off(slim(images), slim(images)) > 1e-3
            slim.eval()
            assert torch.equal(slim(images), slim(images))

    def test_distilled_training_gives_both_answers(self):
        model, slim = slim_pair("deit_distilled")
        slim.train().set_distilled_training()
        one, other = slim(random_images(model, 2))
        assert one.shape == other.shape == (2, 7)
        assert off(one, other) > 1e-2


class TestTracing:
    @pytest.mark.parametrize("semantics", SEMANTICS)
    @pytest.mark.usefixtures("fresh_compiler")
    def test_compile(self, semantics):
        model, slim = slim_pair("deit3", semantics, torch.float32)
        images = random_images(model, 2)
        check_compiled(slim, images)

    @pytest.mark.usefixtures("fresh_compiler")
    def test_inductor(self):
        model = randomise(VisionTransformer(img_size=32, **{**SMALL, "depth": 2})).eval()
        slim = apply_masks(model, Masks.from_counts([4, 3], (2, 2)))
        images = random_images(model, 2)
        check_compiled(slim, images, "inductor")

    @pytest.mark.usefixtures("fresh_compiler")
    def test_compile_for_training(self):
        model, slim = slim_pair("deit", "zero", torch.float32)
        images = random_images(model, 2)
        slim.train()
        gradients = []
        for run in (slim, torch.compile(slim, fullgraph=True, backend="aot_eager")):
            slim.zero_grad()
            run(images).square().sum().backward()
            gradients.append(slim.blocks[0].attn.qkv.weight.grad.clone()[None])
        assert off(gradients[1], gradients[0]) < FLOAT32

    @pytest.mark.parametrize("semantics", SEMANTICS)
    def test_export_with_a_dynamic_batch(self, semantics):
        model, slim = slim_pair("deit_distilled", semantics, torch.float32)
        check_exported(slim, model)

    def test_symbolic_tracing_is_refused_for_what_it_is(self):
        slim = slim_pair("deit", "drop", torch.float32)[1]
        for known in (None, {"attn_mask": None, "is_causal": False}):
            with pytest.raises(SlimvitError, match="cannot be traced symbolically"):
                torch.fx.symbolic_trace(slim, known)

    def test_without_memory(self):
        """As tools do that estimate what a model needs."""
        model = build("deit")
        fast = accelerate(model, random_masks(model), backend="torch")
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert fast(torch.empty(2, 3, 64, 64)).shape == (2, model.num_classes)
