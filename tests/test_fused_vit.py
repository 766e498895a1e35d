"""Whole networks of fused blocks against timm's blocks in float64, and the module around them."""

import copy
import functools
import io
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, FLOOR, distance
from references import (
    MODELS,
    build,
    random_images,
    random_masks,
    reference_features,
    transposed,
)
from torch import Tensor, nn

from slimvit import Masks
from slimvit.errors import SlimvitError, UsageError
from slimvit.masks import SEMANTICS
from slimvit.runtime import AcceleratedViT, accelerate

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
REFUSED = {
    "dinov2_swiglu": "block 1: its MLP is GluMlp, not two layers and an activation",
    "qk_norm": "block 1: it has q_norm, a LayerNorm",
    "rms_norm": "block 1: it has q_norm, a RmsNorm",
    "scale_norms": "block 1: it has attn_norm, a LayerNorm",
    "dynamic_img_pad": "images are padded or cropped to whole patches",
    "gated": "block 1: its attention is gated",
}
# To kernels the same as one of the others, whose network they have.
TWINS = ["augreg", "dynamic_img_size", "no_classes", "distilled_no_classes"]
DISTINCT = [name for name in MODELS if name not in REFUSED and name not in TWINS]
# Every model once, and one of them in every way that pruned tokens can be understood.
PAIRS = [(name, SEMANTICS[i % 3], 1) for i, name in enumerate(DISTINCT)]
PAIRS += [("deit3", semantics, 2) for semantics in SEMANTICS]


@functools.cache
def model_of(name: str) -> nn.Module:
    """Not to be changed."""
    return build(name).to(DEVICE)


@functools.cache
def masks_of(name: str, semantics: str) -> Masks:
    return random_masks(model_of(name), semantics)


def images_of(name: str = "deit", batch: int = 2) -> Tensor:
    """Images that every floating dtype holds exactly, or nearly so."""
    return random_images(model_of(name).cpu(), batch).bfloat16().float().to(DEVICE)


def make(
    name: str = "deit",
    semantics: str = "drop",
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> AcceleratedViT:
    precision, masks = str(dtype).removeprefix("torch."), masks_of(name, semantics)
    model = model_of(name).to(DEVICE)
    return accelerate(model, masks, backend="triton", precision=precision, **options)


@torch.no_grad()
def errs_no_more_than_torch(model: nn.Module, fast: AcceleratedViT, images: Tensor) -> None:
    """Features against timm's blocks, logits against timm's head of the same features."""
    dtype = getattr(torch, fast.precision)
    exact, own = (copy.deepcopy(model).cpu().to(kind) for kind in (torch.float64, dtype))

    def check(got: Tensor, answer: Callable[[nn.Module, torch.dtype], Tensor], floor: float):
        wanted = answer(exact, torch.float64)
        torchs = distance(answer(own, dtype), wanted)
        assert got.dtype == images.dtype
        assert distance(got.cpu(), wanted) <= max(2 * torchs, floor)

    features = fast.forward_features(images)
    check(
        features,
        lambda model, kind: reference_features(model, images.cpu().to(kind), fast.masks),
        FLOOR[dtype],
    )
    # How seven logits are rounded is luck.
    floor = max(FLOOR[dtype], torch.finfo(dtype).eps)
    head = fast.forward_head(features)
    check(head, lambda model, kind: model.forward_head(features.cpu().to(kind)), floor)


@pytest.mark.usefixtures("poison_empty")
class TestAnswers:
    @dtypes
    @pytest.mark.parametrize(("name", "semantics", "batch"), PAIRS)
    def test_features_and_head(self, dtype, name, semantics, batch):
        fast = make(name, semantics, dtype)
        errs_no_more_than_torch(model_of(name), fast, images_of(name, batch))

    @pytest.mark.parametrize("name", TWINS)
    def test_twins_are_taken(self, name):
        fast = make(name)
        assert fast.backend == "triton"
        features = torch.randn(1, fast.masks.tokens, 48).to(DEVICE)
        with torch.no_grad():
            wanted = model_of(name).to(DEVICE).forward_head(features)
        torch.testing.assert_close(fast.forward_head(features), wanted)

    @dtypes
    @pytest.mark.parametrize("semantics", SEMANTICS)
    def test_logits(self, dtype, semantics):
        fast, images = make("depth_1", semantics, dtype), images_of("depth_1")
        assert torch.equal(fast(images), fast.forward_head(fast.forward_features(images)))

    def test_weights_of_any_strides(self):
        model, masks = model_of("deit").to(DEVICE), masks_of("deit", "drop")
        fast = accelerate(transposed(model), masks, backend="triton", precision="float32")
        torch.testing.assert_close(fast(images_of()), make()(images_of()))

    @dtypes
    def test_one_token_is_left(self, dtype):
        keep = torch.zeros(3, 17, dtype=torch.bool)
        keep[0, ::2], keep[1, :4:2], keep[2, :1] = True, True, True
        model = model_of("deit").to(DEVICE)
        precision = str(dtype).removeprefix("torch.")
        masks = Masks(keep, 1, (4, 4))
        fast = accelerate(model, masks, backend="triton", precision=precision)
        assert [bool(block.keys.numel()) for block in fast.fused.blocks] == [False, True, True]
        errs_no_more_than_torch(model, fast, images_of("deit", 3))

    @dtypes
    def test_real(self, dtype, real):
        from slimvit import models
        from slimvit.data import ImageFolder, image_transform, loader

        name = "deit_tiny_patch16_224"
        model = models.create(name, checkpoint=real / f"{name}.safetensors")
        folder = ImageFolder(real / "images", samples=1, transform=image_transform(model))
        images, _ = next(iter(loader(folder, 1)))
        masks = Masks.from_counts([63, 15, *[11] * 9, 1], (14, 14))
        precision = str(dtype).removeprefix("torch.")
        fast = accelerate(model.to(DEVICE), masks, backend="triton", precision=precision)
        errs_no_more_than_torch(model, fast, images.to(DEVICE))

    @dtypes
    def test_nan_stays_in_its_image(self, dtype):
        fast, images = make("depth_1", dtype=dtype), images_of("depth_1", 3)
        wanted = fast(images)
        images[1, 1, 20, 20] = math.nan
        got = fast(images)
        assert got[1].isnan().all()
        assert torch.equal(got[::2], wanted[::2])

    @dtypes
    @pytest.mark.parametrize("kind", [torch.float64, torch.float16, DTYPES[2]], ids=str)
    def test_images_of_any_dtype(self, dtype, kind):
        fast, images = make("depth_1", dtype=dtype), images_of("depth_1")
        got, wanted = fast(images.to(kind)), fast(images)
        assert got.dtype == kind
        assert torch.equal(got, wanted.to(kind))

    def test_images_of_any_strides(self):
        fast, images = make("oblong"), images_of("oblong", 1)
        wanted = fast(images)
        for view in (images.mT.contiguous().mT, images.repeat_interleave(2, 3)[..., ::2]):
            assert not view.is_contiguous()
            assert torch.equal(fast(view), wanted)


class TestModule:
    def test_attributes(self):
        fast = make("deit_distilled", "zero")
        assert (fast.backend, fast.precision, fast.num_classes) == ("triton", "float32", 7)
        assert "backend=triton, precision=float32, kept=(16, 12, 7)" in repr(fast)
        assert not fast.train().training

    def test_the_model_is_left_alone(self):
        model = build("deit3").train().to(DEVICE)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        modules = [(name, type(module)) for name, module in model.named_modules()]
        fast = accelerate(model, masks_of("deit3", "zero"), backend="triton", precision="float16")
        images = images_of("deit3")
        wanted = fast(images)
        assert model.training
        assert [(name, type(module)) for name, module in model.named_modules()] == modules
        for key, value in model.state_dict().items():
            assert torch.equal(state[key], value)
        assert all(parameter.requires_grad for parameter in model.parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(fast(images), wanted)

    def test_no_gradient(self):
        fast, images = make("depth_1"), images_of("depth_1").requires_grad_()
        assert not any(tensor.requires_grad for tensor in fast.parameters())
        assert not fast(images.detach()).requires_grad
        with pytest.raises(SlimvitError, match="back end triton computes no gradients"):
            fast(images)
        with torch.inference_mode():
            assert fast(images.detach()).shape == (2, 7)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_copies(self, dtype):
        fast, images = make("depth_1", "zero", dtype), images_of("depth_1", 1)
        wanted = fast(images)
        file = io.BytesIO()
        torch.save(fast, file)
        file.seek(0)
        copies = [
            copy.deepcopy(fast),
            pickle.loads(pickle.dumps(fast)),
            torch.load(file, weights_only=False),
        ]
        del fast
        for twin in copies:
            assert (twin.backend, twin.precision) == ("triton", str(dtype).removeprefix("torch."))
            assert torch.equal(twin(images), wanted)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_another_precision_is_refused(self, dtype):
        fast, images = make("depth_1"), images_of("depth_1", 1)
        wanted, name = fast(images), str(dtype).removeprefix("torch.")
        message = f"weights are folded for float32, got {name}: accelerate the model anew"
        for module in (fast, nn.Sequential(fast)):
            with pytest.raises(SlimvitError, match=message):
                module.to(dtype)
        fast.to(DEVICE, torch.float32)
        assert torch.equal(fast(images), wanted)

    @pytest.mark.parametrize(
        "move",
        [
            lambda module: module.half(),
            lambda module: module.to(DEVICE, torch.float16),
            lambda module: module.to(memory_format=torch.channels_last),
        ],
        ids=["half", "to", "channels_last"],
    )
    def test_its_own_precision_changes_nothing(self, move):
        fast, images = make("deit3", dtype=torch.float16), images_of("deit3", 1)
        wanted = fast(images)
        before = {name: buffer.dtype for name, buffer in fast.named_buffers()}
        assert set(before.values()) >= {torch.float16, torch.float32}
        move(nn.Sequential(fast))
        assert {name: buffer.dtype for name, buffer in fast.named_buffers()} == before
        assert torch.equal(fast(images), wanted)

    def test_norms_that_autocast_has_in_float32(self):
        class Wide(nn.Module):
            def __init__(self, norm: nn.Module) -> None:
                super().__init__()
                self.norm = norm

            def forward(self, x: Tensor) -> Tensor:
                return self.norm(x).float()

        fast, images = make("clip", dtype=torch.float16), images_of("clip", 1)
        wanted = fast(images), fast.forward_features(images)
        fused = fast.fused
        assert not isinstance(fused.norm_pre, nn.Identity)
        fused.norm_pre, fused.norm = Wide(fused.norm_pre), Wide(fused.norm)
        assert torch.equal(fast(images), wanted[0])
        assert torch.equal(fast.forward_features(images), wanted[1])

    def test_moves(self):
        fast = make("depth_1").to("meta")
        assert fast(images_of("depth_1").to("meta")).shape == (2, 7)
        assert fast.forward_features(images_of("depth_1").to("meta")).shape == (2, 17, 48)

    @pytest.mark.parametrize(("name", "semantics"), [("clip", "zero"), ("depth_1", "idle")])
    @pytest.mark.usefixtures("fresh_compiler")
    def test_compile(self, name, semantics):
        fast = make(name, semantics)
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        for batch in (1, 2):
            images = images_of(name, batch)
            assert torch.equal(compiled(images), fast(images))

    def test_export_with_a_dynamic_batch(self):
        fast, shapes = make("depth_1"), ({0: torch.export.Dim("batch")},)
        program = torch.export.export(fast, (images_of("depth_1"),), dynamic_shapes=shapes)
        for batch in (1, 3):
            images = images_of("depth_1", batch)
            assert torch.equal(program.module()(images), fast(images))


class TestRefused:
    @pytest.mark.parametrize("name", [name for name in MODELS if name in REFUSED])
    def test_models(self, name):
        message = f"back end triton does not compute this model: {REFUSED[name]}"
        with pytest.raises(SlimvitError, match=message):
            make(name)

    @pytest.mark.parametrize("call", ["forward", "forward_features"])
    def test_images(self, call):
        call = getattr(make("depth_1"), call)
        wrong = {
            r"images must be \[B, 3, 64, 64\], got \[1, 3, 32, 64\]": torch.zeros(1, 3, 32, 64),
            r"images must be \[B, 3, 64, 64\], got \[1, 3, 32, 128\]": torch.zeros(1, 3, 32, 128),
            r"images must be \[B, 3, 64, 64\], got \[3, 64, 64\]": torch.zeros(3, 64, 64),
            "images must be floating point, got uint8": torch.zeros(1, 3, 64, 64).byte(),
        }
        for message, images in wrong.items():
            with pytest.raises(SlimvitError, match=message):
                call(images.to(DEVICE))

    def test_no_images(self):
        fast = make("depth_1")
        none = torch.zeros(0, 3, 64, 64, device=DEVICE)
        assert fast(none).shape == (0, fast.num_classes)
        assert fast.forward_features(none).shape == (0, fast.masks.tokens, 48)

    def test_graphs_of_a_model_on_a_cpu(self):
        model, masks = build("depth_1"), masks_of("depth_1", "drop")
        wrong = {
            "a CUDA graph needs the model on a GPU, it is on cpu": [1],
            "cuda_graphs needs batch_sizes, a graph for each: they are empty": [],
        }
        for message, sizes in wrong.items():
            with pytest.raises(UsageError, match=message):
                accelerate(model, masks, batch_sizes=sizes, cuda_graphs=True)
        for sizes in ([0], [1, -2]):
            with pytest.raises(UsageError, match="each of batch_sizes must be at least 1, got"):
                accelerate(model, masks, batch_sizes=sizes)
        for sizes in (8, [1.5], ["1"]):
            with pytest.raises(
                UsageError,
                match="batch_sizes must be (whole numbers in a list|a whole number), got",
            ):
                accelerate(model, masks, batch_sizes=sizes)
        fast = accelerate(model, masks, backend="torch", batch_sizes=[1, 3])
        with pytest.raises(UsageError, match="a CUDA graph needs the model on a GPU, it is on cpu"):
            fast.warm_up(1, cuda_graph=True)
