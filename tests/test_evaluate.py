import copy

import pytest
import torch
from torch import nn

from slimvit import Masks, SPViT, accelerate, apply_masks, models
from slimvit.data import ImageFolder, image_transform, loader
from slimvit.errors import DataError, SlimvitError, UsageError
from slimvit.evaluate import evaluate
from slimvit.finetune import finetune
from slimvit.runtime import AcceleratedViT


class Answers(nn.Module):
    """A model whose images are their own index into a table of answers."""

    def __init__(self, table, num_classes=10):
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(table, dtype=torch.float32))
        self.num_classes = num_classes

    def forward(self, images):
        return self.table[images.long()]


def answering(classes, count=10):
    """First answer as given, then the classes from 0 up."""
    table = -torch.arange(float(count)).repeat(len(classes), 1)
    table[torch.arange(len(classes)), torch.as_tensor(classes)] = 1.0
    return Answers(table)


def batches(targets, size):
    images = torch.arange(float(len(targets)))
    return list(zip(images.split(size), torch.as_tensor(targets).split(size)))


@pytest.mark.parametrize("size", [1, 3, 8])
def test_percentages(size):
    dense, slim = answering([1, 2, 3, 4, 5, 6, 7, 8]), answering([1, 2, 3, 4, 0, 0, 0, 8])
    found = evaluate(dense, slim, batches([1, 9, 3, 8, 5, 3, 7, 4], size))
    assert (found.images, found.labelled) == (8, 8)
    assert found.dense_top1 == 50.0  # images 0, 2, 4, 6
    assert found.top1 == 25.0  # images 0, 2
    assert found.top5 == 37.5  # and image 5, whose label 3 is among the first five
    assert found.agreement == 62.5
    assert -1 <= found.cosine < 1
    p, q = dense.table.double().softmax(1), slim.table.double().softmax(1)
    kl = (p * (p / q).log()).sum(1).mean().item()
    assert found.divergence == pytest.approx(kl, abs=1e-6) and kl > 0.1


def test_only_labelled_images_count_for_accuracy():
    dense, slim = answering([1, 2, 3]), answering([1, 2, 0])
    found = evaluate(dense, slim, batches([1, -1, 3], 2))
    assert (found.images, found.labelled) == (3, 2)
    assert (found.top1, found.dense_top1) == (50.0, 100.0)
    assert found.agreement == pytest.approx(66.6667)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": 0, "label": 1}, r"batches must be \(images, targets\), got dict"),
        (torch.zeros(2), r"batches must be \(images, targets\), got Tensor"),
        ((torch.zeros(2),), r"batches must be \(images, targets\), got tuple of 1"),
        ((torch.zeros(2), [0, 1]), r"tensors \(images, targets\), got \(Tensor, list\)"),
        ((torch.zeros(2), torch.rand(2, 10)), r"classes \[b\] = \[2\], .*, got \[2, 10\] float32"),
        ((torch.zeros(2), torch.zeros(2)), r"classes \[b\] = \[2\], whole .*, got \[2\] float32"),
        ((torch.zeros(2), torch.zeros(2) > 0), r"classes \[b\] = \[2\], .*, got \[2\] bool"),
        ((torch.zeros(2), torch.tensor([1])), r"classes \[b\] = \[2\], .*, got \[1\] int64"),
    ],
)
def test_batches_of_another_kind_are_named(batch, message):
    with pytest.raises(UsageError, match=message):
        evaluate(answering([1, 2]), answering([1, 2]), [batch])


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), r"\[2, 3, 64, 64\] uint8"),
        (torch.zeros(2, 3, 32, 32), r"\[2, 3, 32, 32\] float32"),
        (torch.zeros(2, 1, 64, 64), r"\[2, 1, 64, 64\] float32"),
        (torch.zeros(2, 64, 64), r"\[2, 64, 64\] float32"),
    ],
)
@pytest.mark.parametrize("accelerated", [False, True])
def test_images_that_the_models_do_not_take(tiny_vit, images, got, accelerated):
    dense = accelerate(tiny_vit, Masks.dense(6, (4, 4))) if accelerated else tiny_vit
    rule = r"images must be \[b, 3, 64, 64\], floating-point, got "
    with pytest.raises(UsageError, match=rule + got):
        evaluate(dense, tiny_vit, [(images, torch.tensor([0, -1]))])


def test_images_of_models_that_tell_no_shape_are_floating_too():
    with pytest.raises(UsageError, match=r"images must be \[b, …\], floating-point, .* uint8"):
        evaluate(answering([1]), answering([1]), [(torch.zeros(1).byte(), torch.tensor([0]))])


@pytest.mark.parametrize("name", ["dense", "slim"])
def test_what_is_no_model(tiny_vit, labelled, name):
    models = {"dense": tiny_vit, "slim": tiny_vit, name: "deit_tiny"}
    with pytest.raises(UsageError, match=rf"{name} must be a torch\.nn\.Module, got str"):
        evaluate(**models, loader=labelled)
    with pytest.raises(UsageError, match=rf"{name} must be a torch\.nn\.Module, got str"):
        finetune(models["slim"], models["dense"], labelled, epochs=1)


def test_models_of_other_classes():
    with pytest.raises(UsageError, match=r"slim must answer .*, \[2, 10\], got \[2, 7\]"):
        evaluate(answering([1, 2]), answering([1, 2], 7), batches([1, 2], 2))


def test_labels_beyond_the_classes():
    with pytest.raises(UsageError, match="targets must be below 10, the number of .*, got 10"):
        evaluate(answering([1, 2]), answering([1, 2]), batches([-1, 10], 2))


def test_empty_batches_are_passed_over(tiny_vit):
    """As `loader(…, keep_empty=True)` gives them."""
    empty = torch.empty(0), torch.empty(0, dtype=torch.int64)
    batch = torch.zeros(2, 3, 64, 64), torch.tensor([1, 2])
    assert evaluate(tiny_vit, tiny_vit, [empty, batch]).images == 2


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
def test_targets_of_any_whole_numbers(dtype):
    loader = [(torch.arange(2.0), torch.tensor([1, -1], dtype=dtype))]
    found = evaluate(answering([1, 2]), answering([1, 2]), loader)
    assert (found.labelled, found.top1) == (1, 100.0)


def test_without_labels():
    found = evaluate(answering([1, 2]), answering([1, 2]), batches([-1, -1], 2))
    assert (found.top1, found.top5, found.dense_top1, found.dense_top5) == (None,) * 4
    assert found.agreement == 100.0 and found.cosine == pytest.approx(1)


def test_fewer_than_five_classes():
    found = evaluate(answering([1, 2], 3), answering([1, 0], 3), batches([0, 0], 2))
    assert (found.top1, found.top5) == (50.0, 100.0)


def test_features_have_no_agreement():
    dense, slim = Answers([[1.0, 0], [0, 1]], 0), Answers([[2.0, 0], [1, 0]], 0)
    found = evaluate(dense, slim, batches([0, 1], 1))
    assert (
        found.agreement is None
        and found.divergence is None
        and found.top1 is None
        and found.labelled == 0
    )
    assert found.cosine == 0.5


@pytest.mark.parametrize("name", ["dense", "slim"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_must_be_finite(name, value):
    pair = {"dense": answering([1, 2]), "slim": answering([1, 2])}
    pair[name].table.data[1, 1] = value
    with pytest.raises(SlimvitError, match=f"{name} model's outputs must be finite"):
        evaluate(pair["dense"], pair["slim"], batches([1, 2], 1))


def test_no_image():
    with pytest.raises(DataError, match="no image"):
        evaluate(answering([1]), answering([1]), [])


def test_dense_masks_agree_everywhere(tiny_vit):
    spec = models.spec(tiny_vit)
    same = accelerate(tiny_vit, Masks.dense(spec.depth, spec.grid, spec.prefix))
    images = torch.randn(7, 3, *spec.image_size, generator=torch.Generator().manual_seed(0))
    found = evaluate(tiny_vit, same, [(images, torch.full((7,), -1))])
    assert found.agreement == 100.0 and found.cosine == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_models_of_any_dtype(tiny_vit, backend):
    """The loader's images are float32, whatever the models compute in."""
    dense = tiny_vit.bfloat16()
    spec = models.spec(dense)
    masks = Masks.dense(spec.depth, spec.grid, spec.prefix)
    images = torch.randn(7, 3, *spec.image_size, generator=torch.Generator().manual_seed(0))
    loader = [(images, torch.full((7,), -1))]
    for slim in (apply_masks(dense, masks), accelerate(dense, masks, backend=backend)):
        assert evaluate(dense, slim, loader).cosine > 0.99


def test_accelerated_models_answer_in_float32():
    """A tie in bfloat16 that float32 parts: 1.0 and 1.001."""

    class Wide(AcceleratedViT):
        def __init__(self):
            nn.Module.__init__(self)
            self.table = nn.Parameter(torch.tensor([[1.0, 1.001]], dtype=torch.bfloat16))

        def forward(self, images):
            return torch.tensor([[1.0, 1.001]], dtype=images.dtype)

    dense = Answers([[0.0, 1.0]], 2)
    assert evaluate(dense, Wide(), batches([1], 1)).agreement == 100.0


def test_real_top1(real):
    name = "deit_tiny_patch16_224"
    model = models.create(name, checkpoint=real / f"{name}.safetensors")
    images = ImageFolder(
        real / "images",
        real / "imagenet_synsets.txt",
        samples=24,
        transform=image_transform(model),
        num_classes=1000,
    )
    spec = models.spec(model)
    masks = Masks.from_counts([197] * 11 + [1], spec.grid, spec.prefix)
    found = evaluate(model, accelerate(model, masks), loader(images, 8))
    assert found.images == found.labelled == 24
    assert found.agreement == 100.0  # a last block of only the class token loses nothing
    assert found.dense_top1 == found.top1 and 60 <= found.top1 <= 95


def test_models_are_evaluated_in_evaluation_mode(tiny_vit, labelled):
    """In training selectors draw what they keep; one block is left in evaluation mode."""
    tiny_vit.head_drop.p = 0.5
    slim = apply_masks(tiny_vit, SPViT([0.6, 0.3]))
    wanted = evaluate(tiny_vit, slim, labelled)
    for model in (tiny_vit, slim):
        model.train().blocks[2].eval()
    modes = [module.training for model in (tiny_vit, slim) for module in model.modules()]
    state = torch.get_rng_state()
    assert evaluate(tiny_vit, slim, labelled) == wanted
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for model in (tiny_vit, slim) for module in model.modules()]


def test_in_inference_mode_and_compiled(tiny_vit, labelled):
    tiny_vit.head_drop.p = 0.5
    same = copy.deepcopy(tiny_vit)
    wanted = evaluate(tiny_vit, same, labelled)
    compiled = torch.compile(tiny_vit.train(), backend="eager")
    with torch.inference_mode():
        assert evaluate(compiled, same, labelled) == wanted
    assert compiled.training and tiny_vit.training


def test_a_compiled_accelerated_model_takes_the_same_images(tiny_vit, labelled):
    """They are not rounded to bfloat16 beforehand."""
    masks = Masks.from_counts((17, 9, 9, 9, 9, 1), (4, 4))
    fast = accelerate(tiny_vit.bfloat16(), masks)
    compiled = torch.compile(fast, backend="eager")
    assert evaluate(tiny_vit, compiled, labelled) == evaluate(tiny_vit, fast, labelled)


def test_what_is_no_loader(tiny_vit):
    for wrong in (None, tiny_vit):
        with pytest.raises(UsageError, match="loader must give batches one by one, got "):
            evaluate(tiny_vit, tiny_vit, wrong)
