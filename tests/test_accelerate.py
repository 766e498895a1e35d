"""accelerate against timm's blocks, its precisions, and what it refuses."""

import copy
import pickle

import pytest
import torch
from references import MODELS, build, off, random_images, random_masks, reference_features
from timm.models.vision_transformer import LayerScale
from torch import nn
from tracing import check_compiled, check_exported

from slimvit.backends import NAMES, why_not
from slimvit.errors import PlanError, SlimvitError, UsageError
from slimvit.masks import SEMANTICS, Masks
from slimvit.models import spec
from slimvit.runtime import AcceleratedViT, accelerate, apply_masks

FLOAT32 = 1e-5
LAYER_SCALED = ("deit3", "dinov2_reg4", "dinov2_swiglu", "scale_norms", "no_biases")


def fast_pair(
    name: str = "deit", semantics: str = "drop", **options: object
) -> tuple[nn.Module, AcceleratedViT]:
    model = build(name)
    return model, accelerate(model, random_masks(model, semantics), **options)


@torch.no_grad()
def exact_answer(model: nn.Module, images: torch.Tensor, masks: Masks) -> torch.Tensor:
    model = copy.deepcopy(model).double()
    return model.forward_head(reference_features(model, images.double(), masks))


@pytest.mark.parametrize("backend", ["auto", "torch"])
class TestAnswers:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("semantics", SEMANTICS)
    def test_dense_masks_answer_like_timm(self, name, semantics, backend):
        model = build(name)
        read = spec(model)
        masks = Masks.dense(read.depth, read.grid, read.prefix, semantics=semantics)
        fast = accelerate(model, masks, backend=backend)
        images = random_images(model, 3)
        with torch.no_grad():
            assert off(fast(images), model(images)) < FLOAT32
            features = model.forward_features(images)
            assert off(fast.forward_features(images), features) < FLOAT32
            assert off(fast.forward_head(features), model.forward_head(features)) < FLOAT32

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("semantics", SEMANTICS)
    def test_equals_timms_blocks(self, poison_empty, name, semantics, backend):
        model, fast = fast_pair(name, semantics, backend=backend)
        images = random_images(model, 3)
        features = reference_features(model, images, fast.masks)
        assert off(fast.forward_features(images), features) < FLOAT32
        with torch.no_grad():
            assert off(fast(images), model.forward_head(features)) < FLOAT32
            pre_logits = model.forward_head(features, pre_logits=True)
        assert off(fast.forward_head(features, pre_logits=True), pre_logits) < FLOAT32

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("semantics", SEMANTICS)
    def test_bfloat16_errs_no_more_than_torch(self, name, semantics, backend):
        model, fast = fast_pair(name, semantics, backend=backend, precision="bfloat16")
        images = random_images(model, 16)
        exact = exact_answer(model, images, fast.masks)
        half = copy.deepcopy(model).bfloat16()
        with torch.no_grad():
            features = reference_features(half, images.bfloat16(), fast.masks)
            torchs = mean_off(half.forward_head(features), exact)
        assert mean_off(fast(images), exact) < 2 * torchs

    def test_real(self, real, backend):
        from slimvit.models import create

        name = "deit_tiny_patch16_224"
        model = create(name, checkpoint=real / f"{name}.safetensors")
        images = random_images(model, 1)
        masks = Masks.from_counts([141, 141, 131, 121, *[111] * 7, 1], (14, 14))
        with torch.no_grad():
            wanted = apply_masks(model, masks)(images)
        fast = accelerate(model, masks, backend=backend)
        assert off(fast(images), wanted) < FLOAT32
        fast = accelerate(model, masks, backend=backend, precision="bfloat16")
        assert off(fast(images), wanted) < 0.05


def mean_off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean relative error of the images: one image's rounding is luck."""
    got, wanted = got.double(), wanted.double()
    return ((got - wanted).norm(dim=1) / wanted.norm(dim=1)).mean().item()


class TestFolding:
    @pytest.mark.parametrize("name", LAYER_SCALED)
    def test_layer_scale_is_folded(self, name):
        model, fast = fast_pair(name, backend="torch")
        assert any(isinstance(module, LayerScale) for module in model.modules())
        left = [name for name, m in fast.named_modules() if isinstance(m, LayerScale)]
        # GLU MLPs keep theirs: only timm's plain Mlp is taken apart.
        assert all(name.endswith("ls2") for name in left)
        assert name in ("dinov2_swiglu", "scale_norms") or not left

    def test_a_parametrized_projection_keeps_its_layer_scale(self):
        model = build("deit3")
        nn.utils.parametrizations.weight_norm(model.blocks[0].attn.proj)
        nn.utils.parametrizations.weight_norm(model.blocks[1].mlp.fc2)
        masks = random_masks(model)
        images = random_images(model, 2)
        with torch.no_grad():
            wanted = model.forward_head(reference_features(model, images, masks))
        assert off(accelerate(model, masks)(images), wanted) < FLOAT32

    def test_nothing_of_the_model_is_changed(self):
        model = build("deit3").train()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        modules = [(name, type(module)) for name, module in model.named_modules()]
        accelerate(model, random_masks(model, "zero"), precision="bfloat16")(
            random_images(model, 1)
        )
        assert model.training
        assert [(name, type(module)) for name, module in model.named_modules()] == modules
        for key, value in model.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(state[key], value)
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_later_changes_of_the_model_do_not_reach_it(self):
        model, fast = fast_pair("deit3", "zero")
        images = random_images(model, 2)
        before = fast(images)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(fast(images), before)


class TestModule:
    @pytest.mark.parametrize("backend", ["cpu", "torch"])
    def test_attributes(self, backend):
        model, fast = fast_pair("deit_distilled", "zero", backend=backend)
        assert (fast.backend, fast.precision, fast.num_classes) == (backend, "float32", 7)
        assert fast.masks.semantics == "zero"
        assert f"backend={backend}, precision=float32, kept=(16, 12, 7)" in repr(fast)

    @pytest.mark.parametrize("training", [False, True])
    def test_stays_in_eval_mode(self, training):
        model = build("deit").train(training)
        fast = accelerate(model, random_masks(model))
        assert fast.train() is fast
        nn.Sequential(fast).train()
        assert not any(module.training for module in fast.modules())

    def test_needs_no_gradient(self):
        model, fast = fast_pair()
        assert not any(parameter.requires_grad for parameter in fast.parameters())
        assert not fast(random_images(model, 1)).requires_grad

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.half])
    def test_answers_in_the_dtype_of_the_images(self, precision, dtype):
        model, fast = fast_pair(precision=precision)
        images = random_images(model, 2).to(dtype)
        for call in (fast, fast.forward_features, lambda x: fast.forward_head(x[:, 0, :2, :48])):
            assert call(images).dtype == dtype

    @pytest.mark.parametrize("precision", [None, "float32", "bfloat16"])
    def test_precision(self, precision):
        for dtype in (torch.float32, torch.bfloat16):
            model = build("deit3").to(dtype)
            fast = accelerate(model, random_masks(model, "zero"), precision=precision)
            assert fast.precision == (precision or str(dtype).removeprefix("torch."))
            floats = [*fast.parameters(), *(b for b in fast.buffers() if b.is_floating_point())]
            assert {str(x.dtype) for x in floats} == {f"torch.{fast.precision}"}

    def test_moves(self):
        model, fast = fast_pair("deit3", "zero", backend="torch")
        images = random_images(model, 2)
        wanted = fast(images)
        fast.to(torch.bfloat16)
        assert fast.precision == "bfloat16"
        assert 1e-4 < off(fast(images), wanted) < 0.1
        fast.to(torch.float32)
        fast.to("meta")
        assert fast(images.to("meta")).shape == (2, 7)

    @pytest.mark.parametrize("backend", ["cpu", "torch"])
    def test_copies(self, backend):
        model, fast = fast_pair("deit3", "zero", precision="bfloat16", backend=backend)
        images = random_images(model, 2)
        for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert (twin.backend, twin.precision) == (backend, "bfloat16")
            assert torch.equal(twin(images), fast(images))

    @pytest.mark.parametrize("where", ["model", "call", "both"])
    def test_made_in_inference_mode(self, where):
        """The weights are packed all the same: plain ones, whose changes are noticed."""
        with torch.inference_mode(where != "call"):
            model = copy.deepcopy(build("deit"))
        images, masks = random_images(model, 2), random_masks(model)
        wanted = accelerate(build("deit"), masks, backend="torch")(images)
        with torch.inference_mode(where != "model"):
            fast = accelerate(model, masks, backend="torch")
        assert not any(parameter.is_inference() for parameter in fast.parameters())
        assert torch.equal(fast(images), wanted)

    def test_masks_given_as_a_path(self, tmp_path):
        model = build("deit")
        masks = random_masks(model, "idle")
        masks.save(tmp_path / "m.safetensors")
        images = random_images(model, 1)
        wanted = accelerate(model, masks)(images)
        for path in (tmp_path / "m.safetensors", str(tmp_path / "m.safetensors")):
            assert torch.equal(accelerate(model, path)(images), wanted)
        with pytest.raises(PlanError, match="not found"):
            accelerate(model, tmp_path / "none.safetensors")

    def test_what_was_trained_can_be_accelerated(self):
        model = build("deit3")
        slim = apply_masks(model, random_masks(model))
        trained = build("deit3", seed=1)
        slim.load_state_dict(trained.state_dict())
        dense = copy.deepcopy(model)
        dense.load_state_dict(slim.state_dict())
        images = random_images(model, 2)
        with torch.no_grad():
            assert off(accelerate(dense, slim.masks)(images), slim(images)) < FLOAT32

    @pytest.mark.parametrize("semantics", SEMANTICS)
    @pytest.mark.usefixtures("fresh_compiler")
    def test_compile(self, semantics):
        model, fast = fast_pair("deit3", semantics)
        images = random_images(model, 2)
        check_compiled(fast, images)

    def test_export_with_a_dynamic_batch(self):
        model, fast = fast_pair("deit_distilled", "zero")
        check_exported(fast, model)


class TestRefused:
    def test_float16_on_the_cpu(self):
        with pytest.raises(SlimvitError, match="float16 is not computed on CPUs"):
            fast_pair(precision="float16")
        with pytest.raises(SlimvitError, match="float16 is not computed on CPUs"):
            fast_pair(precision="float16", backend="torch")

    @pytest.mark.parametrize("precision", ["int8", "", "float64", "half"])
    def test_precision(self, precision):
        message = f"precision must be one of float32, bfloat16, float16, got '{precision}'"
        with pytest.raises(UsageError, match=message):
            fast_pair(precision=precision)

    def test_precision_of_the_model(self):
        model = build("deit").double()
        with pytest.raises(UsageError, match="the model is in float64: give a precision, one of"):
            accelerate(model, random_masks(model))

    @pytest.mark.parametrize("backend", ["tpu", "", "Torch"])
    def test_backend(self, backend):
        with pytest.raises(UsageError, match=f"unknown back end '{backend}': one of auto, torch"):
            fast_pair(backend=backend)

    @pytest.mark.parametrize("backend", NAMES)
    def test_explicit_backend_works_or_says_why(self, backend):
        reason = why_not(backend, "cpu")
        if reason is None:
            assert fast_pair(backend=backend)[1].backend == backend
            return
        with pytest.raises(SlimvitError) as caught:
            fast_pair(backend=backend)
        assert str(caught.value).startswith(f"back end {backend}: {reason}")
        assert "slimvit doctor" in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("qk_norm", "block 1: it has q_norm, a LayerNorm"),
            ("rms_norm", "block 1: it has q_norm, a RmsNorm"),
            ("dinov2_swiglu", "block 1: its MLP is GluMlp, not two layers and an activation"),
            ("dynamic_img_pad", "images are padded or cropped to whole patches"),
        ],
    )
    def test_a_model_that_the_cpu_kernels_do_not_compute(self, name, reason, caplog):
        with pytest.raises(SlimvitError, match=f"back end cpu does not compute this.*{reason}"):
            fast_pair(name, backend="cpu")
        assert fast_pair(name)[1].backend == "torch"
        assert f"back end cpu passed over for this model: {reason}" in caplog.text

    @pytest.mark.parametrize("backend", ["cpu", "torch"])
    @pytest.mark.parametrize("call", ["forward", "forward_features"])
    def test_wrong_images(self, call, backend):
        _, fast = fast_pair(backend=backend)
        with pytest.raises(SlimvitError, match=r"must be \[B, 3, 64, 64\], got \[1, 3, 32, 64\]"):
            getattr(fast, call)(torch.zeros(1, 3, 32, 64))
        with pytest.raises(SlimvitError, match="images must be floating point, got uint8"):
            getattr(fast, call)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
class TestCuda:
    @pytest.mark.parametrize("semantics", SEMANTICS)
    @pytest.mark.parametrize(
        ("precision", "limit"), [("float32", 5e-3), ("bfloat16", 0.1), ("float16", 0.02)]
    )
    def test_answers(self, semantics, precision, limit):
        model = build("deit3")
        images, masks = random_images(model, 3), random_masks(model, semantics)
        exact = exact_answer(model, images, masks)
        fast = accelerate(model.cuda(), masks, precision=precision)
        assert {tensor.device.type for tensor in fast.state_dict().values()} == {"cuda"}
        assert off(fast(images.cuda()).cpu(), exact) < limit

    def test_moves(self):
        model, fast = fast_pair("deit3", "zero", backend="torch")
        images = random_images(model, 2)
        wanted = fast(images)
        assert off(fast.cuda()(images.cuda()).cpu(), wanted) < 5e-3
