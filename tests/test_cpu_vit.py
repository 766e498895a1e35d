"""Whole networks in C++ against timm's blocks in float64, and what a call does not depend on."""

import copy
import functools
import math
import threading
from collections.abc import Iterator

import pytest
import torch
from instruction_sets import DTYPES, isa  # noqa: F401
from references import (
    MODELS,
    build,
    off,
    random_images,
    random_masks,
    reference_features,
    transposed,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from slimvit.masks import SEMANTICS, Masks
from slimvit.runtime import AcceleratedViT, accelerate

SUPPORTED = [
    *("deit", "deit_distilled", "deit3", "dinov2", "dinov2_reg4", "clip_quickgelu"),
    *("no_embed_class", "no_biases", "oblong", "no_classes", "fc_norm", "no_final_norm", "depth_1"),
]
BATCHES = [1, 2, 3, 5, 8, 17]
FLOAT32 = 5e-6
PRECISIONS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is what it was after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@functools.cache
def model_of(name: str) -> nn.Module:
    """Not to be changed."""
    return build(name)


@functools.cache
def masks_of(name: str, semantics: str) -> Masks:
    return random_masks(model_of(name), semantics)


def images_of(name: str, batch: int) -> Tensor:
    return random_images(model_of(name), batch)


def make(name: str, semantics: str = "drop", dtype: torch.dtype = torch.float32) -> AcceleratedViT:
    masks = masks_of(name, semantics)
    return accelerate(model_of(name), masks, backend="cpu", precision=PRECISIONS[dtype])


@torch.no_grad()
def answer(name: str, semantics: str, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """PyTorch's own features and logits."""
    model = copy.deepcopy(model_of(name)).to(dtype)
    images = random_images(model, batch)
    features = reference_features(model, images, masks_of(name, semantics))
    return features, model.forward_head(features)


@functools.cache
def exact(name: str, semantics: str, batch: int) -> tuple[Tensor, Tensor]:
    return answer(name, semantics, batch, torch.float64)


@functools.cache
def torchs_error(name: str, semantics: str, batch: int) -> tuple[float, float]:
    """How far PyTorch is off in bfloat16, features and logits."""
    half = answer(name, semantics, batch, torch.bfloat16)
    return tuple(map(mean_off, half, exact(name, semantics, batch)))


def mean_off(got: Tensor, wanted: Tensor) -> float:
    """Mean relative error of the images: one image's rounding is luck."""
    got, wanted = got.double().flatten(1), wanted.double().flatten(1)
    return ((got - wanted).norm(dim=1) / wanted.norm(dim=1)).mean().item()


@pytest.mark.usefixtures("isa", "poison_empty")
@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("name", SUPPORTED)
class TestAnswers:
    def test_float32(self, name, semantics):
        fast = make(name, semantics)
        features, logits = exact(name, semantics, 3)
        images = images_of(name, 3)
        assert off(fast.forward_features(images), features) < FLOAT32
        assert off(fast(images), logits) < FLOAT32

    def test_bfloat16_errs_no_more_than_torch(self, name, semantics):
        fast = make(name, semantics, torch.bfloat16)
        images = images_of(name, 16)
        got = fast.forward_features(images), fast(images)
        errors = map(mean_off, got, exact(name, semantics, 16))
        for error, torchs in zip(errors, torchs_error(name, semantics, 16)):
            assert error <= 2 * torchs


def test_weights_of_any_strides():
    images, masks = images_of("deit", 2), masks_of("deit", "drop")
    fast = accelerate(transposed(model_of("deit")), masks, backend="cpu", precision="float32")
    assert torch.equal(fast(images), make("deit")(images))


@pytest.mark.parametrize(("name", "norm"), [("deit", "norm"), ("clip_quickgelu", "norm_pre")])
def test_norms_of_any_eps(name, norm):
    model, masks, images = build(name), masks_of(name, "drop"), images_of(name, 3)
    getattr(model, norm).eps = 0.1
    got = accelerate(model, masks, backend="cpu", precision="float32")(images)
    model.double()
    with torch.no_grad():
        wanted = model.forward_head(reference_features(model, images.double(), masks))
    assert off(got, wanted) < FLOAT32


def test_every_other_model_is_refused():
    """Those of MODELS that are neither above nor twins of one above."""
    twins = {"augreg", "clip", "dynamic_img_size", "distilled_no_classes", "no_pos_embed"}
    for name in MODELS.keys() - {*SUPPORTED} - twins:
        with pytest.raises(ValueError, match="back end cpu does not compute this model: "):
            make(name)


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_and_threads_do_not_matter(dtype, semantics):
    """Neither how many images come together nor who computes them: the same bits."""
    fast = make("deit_distilled", semantics, dtype)
    images = images_of("deit_distilled", 17)
    torch.set_num_threads(1)
    logits = torch.cat([fast(image) for image in images.split(1)])
    features = torch.cat([fast.forward_features(image) for image in images.split(1)])
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        for batch in BATCHES:
            assert torch.equal(fast(images[:batch]), logits[:batch]), (count, batch)
            assert torch.equal(fast.forward_features(images[-batch:]), features[-batch:])


@pytest.mark.usefixtures("isa")
def test_one_token_is_left():
    """Groups of up to eight images then go through the last blocks together."""
    model = build("deit")
    keep = torch.zeros(3, 17, dtype=torch.bool)
    keep[0, :9], keep[1, :3], keep[2, :1] = True, True, True
    masks = Masks(keep, 1, (4, 4))
    fast = accelerate(model, masks, backend="cpu")
    images = random_images(model, 17)
    model = model.double()
    with torch.no_grad():
        wanted = model.forward_head(reference_features(model, images.double(), masks))
    assert off(fast(images), wanted) < FLOAT32
    assert torch.equal(fast(images), torch.cat([fast(image) for image in images.split(3)]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["deit", "dinov2", "oblong"])
def test_images_of_any_dtype_and_strides(name, dtype):
    fast = make(name, dtype=dtype)
    images = images_of(name, 3).bfloat16().float()
    wanted = fast(images)
    for other in (torch.bfloat16, torch.float64, torch.half):
        got = fast(images.to(other))
        assert got.dtype == other
        assert torch.equal(got, wanted.to(other)) or other is torch.half
    views = [
        images.contiguous(memory_format=torch.channels_last),
        images.transpose(2, 3).contiguous().transpose(2, 3),
        images.repeat_interleave(2, 3)[..., ::2],
        images.repeat(1, 2, 1, 1)[:, : images.shape[1]],
        images.expand(2, *images.shape)[1],
    ]
    for view in views:
        assert torch.equal(fast(view), wanted)
    assert torch.equal(fast(images[:1].expand(3, -1, -1, -1)), wanted[:1].expand(3, -1))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 2])
def test_no_images(count):
    torch.set_num_threads(count)
    fast = make("deit")
    empty = torch.empty(0, 3, 64, 64)
    assert fast(empty).shape == (0, 7)
    assert fast.forward_features(empty).shape == (0, 17, 48)


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["deit", "clip_quickgelu"])
def test_nan_stays_in_its_image(name, dtype, count):
    torch.set_num_threads(count)
    fast = make(name, dtype=dtype)
    images = images_of(name, 5)
    wanted = fast(images)
    images[3, 1, 20, 20] = math.nan
    got = fast(images)
    others = [0, 1, 2, 4]
    assert got[3].isnan().all()
    assert torch.equal(got[others], wanted[others])
    images[3, 1, 20, 20] = math.inf
    assert torch.equal(fast(images)[others], wanted[others])


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_of_earlier_calls_does_not_matter(dtype):
    """Memory is lent to one call after another: a larger model first fills it with NaN."""
    kinds = [("dinov2", "zero"), ("oblong", "drop"), ("no_final_norm", "idle")]
    models = [(make(*kind, dtype), images_of(kind[0], 5)) for kind in kinds]
    odd = make_dense(dtype, 35, 7, depth=1, embed_dim=48, num_heads=3)  # 147 numbers a patch
    models.append((odd, torch.randn(5, 3, 35, 35)))
    large, nan = make_large(dtype), torch.full((9, 3, 96, 96), math.nan)
    for count in (1, 3):
        torch.set_num_threads(count)
        for fast, images in models:
            for call in (fast, fast.forward_features):
                wanted = call(images)
                assert large(nan).isnan().all()
                assert torch.equal(call(images), wanted)


def make_large(dtype: torch.dtype) -> AcceleratedViT:
    """A dense network that needs more memory than the others, of every kind."""
    return make_dense(dtype, 96, 16, depth=2, embed_dim=96, num_heads=6, num_classes=40)


def make_dense(dtype: torch.dtype, size: int, patch: int, **options: int) -> AcceleratedViT:
    with torch.random.fork_rng(devices=[]):
        model = VisionTransformer(size, patch, **options)
    masks = Masks.dense(options["depth"], (size // patch,) * 2, 1)
    return accelerate(model.eval(), masks, backend="cpu", precision=PRECISIONS[dtype])


def test_a_thousand_images():
    fast = make("depth_1")
    images = images_of("depth_1", 1000)
    got = fast(images)
    assert got.isfinite().all()
    for i in (0, 499, 999):
        assert torch.equal(got[i : i + 1], fast(images[i : i + 1]))


class TestCallers:
    @pytest.mark.usefixtures("threads")
    @pytest.mark.parametrize("count", [1, 2])
    def test_threads_that_call_at_once(self, count):
        torch.set_num_threads(count)
        shared, others = make("deit"), [make("dinov2", "zero"), make("deit", "idle")]
        work = []
        for caller in range(8):
            fast = shared if caller % 2 else others[caller // 2 % 2]
            size = 56 if fast is others[0] else 64
            images = torch.randn(1 + caller % 3, 3, size, size)
            work.append((fast, images, fast(images)))
        wrong: list[int] = []

        def call(caller: int) -> None:
            fast, images, wanted = work[caller]
            torch.set_num_threads(count)
            wrong.extend(caller for _ in range(30) if not torch.equal(fast(images), wanted))

        callers = [threading.Thread(target=call, args=(caller,)) for caller in range(8)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
            assert not caller.is_alive()
        assert not wrong

    @pytest.mark.usefixtures("threads")
    def test_memory_does_not_grow(self):
        torch.set_num_threads(1)
        fast, images = make("depth_1"), images_of("depth_1", 2)

        def call(times: int) -> None:
            for _ in range(times):
                fast(images[:1])
                fast.forward_features(images)

        call(100)
        before = resident()
        call(5000)
        assert resident() - before < 8 << 20

    def test_a_module_of_it(self):
        """Copied, in a larger module, and within inference_mode."""
        fast = make("deit3", "zero")
        images = images_of("deit3", 2)
        wanted = fast(images)
        assert torch.equal(nn.Sequential(copy.deepcopy(fast))(images), wanted)
        with torch.inference_mode():
            assert torch.equal(fast(images), wanted)


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
