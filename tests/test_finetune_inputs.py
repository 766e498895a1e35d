"""What fine-tuning takes, and what it refuses."""

import subprocess
from copy import deepcopy

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tuning import QUICK, same, weights

from slimvit import Masks, apply_masks
from slimvit.dynamic import SPViT
from slimvit.errors import DataError, UsageError
from slimvit.finetune import Settings, finetune, plan_path, resume_path


@pytest.mark.parametrize(
    "name, value, rule",
    [
        ("epochs", -1, "at least 0"),
        ("epochs", 1.5, "a whole number"),
        ("lr", 0.0, "finite and above 0"),
        ("lr", float("nan"), "finite and above 0"),
        ("lr", float("inf"), "finite"),
        ("weight_decay", -0.1, "finite and at least 0"),
        ("temperature", 0.0, "finite and above 0"),
        ("alpha", 1.1, "finite, at least 0 and at most 1"),
        ("clip", -1.0, "finite and at least 0"),
        ("amp", "int8", "one of auto, bfloat16, float16, none"),
        ("ema_decay", 1.0, "finite, above 0 and below 1"),
        ("seed", 2**64, "at most 4294967295"),
        ("keep_weight", -1.0, "finite and at least 0"),
        ("frozen_epochs", -1, "at least 0"),
        ("backbone_rate", float("nan"), "finite and at least 0"),
    ],
)
def test_settings_are_checked(name, value, rule):
    with pytest.raises(UsageError, match=f"{name} must be {rule}.*, got {value!r}"):
        Settings(**{name: value})


def test_loader_is_checked(pair, labelled):
    with pytest.raises(UsageError, match="must have a length"):
        finetune(*pair, iter(labelled), **QUICK)
    with pytest.raises(DataError, match="too few images"):
        finetune(*pair, [], **QUICK)


@pytest.mark.parametrize("name", ["loader", "val_loader"])
def test_what_is_no_loader(pair, labelled, name):
    loaders = {"loader": labelled, "val_loader": labelled, name: pair[1]}
    rule = f"^{name} must give batches one by one, got VisionTransformer"
    with pytest.raises(UsageError, match=rule):
        finetune(*pair, loaders["loader"], val_loader=loaders["val_loader"], epochs=1, **QUICK)


@pytest.mark.parametrize("plan", [None, SPViT([0.5])], ids=str)
def test_inference_mode_is_refused(pair, labelled, plan):
    slim = pair[0] if plan is None else apply_masks(pair[1], plan)
    rule = r"finetune trains: call it outside torch\.inference_mode"
    with torch.inference_mode(), pytest.raises(UsageError, match=rule):
        finetune(slim, pair[1], labelled, epochs=1, **QUICK)


@pytest.mark.parametrize("options", [{}, {"amp": "float16"}, {"ema_decay": 0.5}], ids=str)
def test_batches_without_any_image(pair, labelled, tmp_path, options):
    before, empty = weights(pair[0]), [(images[:0], targets[:0]) for images, targets in labelled]
    output = tmp_path / "slim.safetensors"
    with pytest.raises(DataError, match="there is no image to train on: epoch 1 has none"):
        finetune(*pair, empty, epochs=2, output=output, **QUICK | options)
    assert same(weights(pair[0]), before) and list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_go(pair, labelled, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    output = tmp_path / "slim.safetensors"
    for path in (output, resume_path(output), plan_path(output)):
        path.with_name(f".{path.name}.{dead.pid}.abcd_012").write_bytes(b"half")
    finetune(*pair, labelled, epochs=1, output=output, **QUICK)
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("amp", ["none", "bfloat16"])
def test_autocast_around_the_call_has_no_say(pair, labelled, amp):
    slim, dense = pair
    other, options = deepcopy(slim), QUICK | {"epochs": 1, "amp": amp}
    finetune(slim, dense, labelled, val_loader=labelled, **options)
    with torch.autocast("cpu", torch.bfloat16):
        finetune(other, dense, labelled, val_loader=labelled, **options)
    assert same(weights(other), weights(slim))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_soft_labels_are_refused(pair, labelled, alpha):
    soft = [(images, F.one_hot(targets, 10).float()) for images, targets in labelled]
    with pytest.raises(UsageError, match=r"targets must be classes .*, got \[6, 10\] float32"):
        finetune(*pair, soft, epochs=1, alpha=alpha, **QUICK)


def test_labels_of_any_whole_numbers(pair, labelled):
    slim, dense = pair
    other = deepcopy(slim)
    finetune(slim, dense, labelled, epochs=1, alpha=0.5, **QUICK)
    short = [(images, targets.int()) for images, targets in labelled]
    finetune(other, dense, short, epochs=1, alpha=0.5, **QUICK)
    assert same(weights(other), weights(slim))


@pytest.mark.parametrize("selectors", [False, True])
def test_labels_beyond_the_classes(pair, labelled, selectors):
    slim, dense = pair
    labelled[1][1][2] = 10
    finetune(slim, dense, labelled, epochs=1, **QUICK)  # where labels do not count
    if selectors:
        slim = apply_masks(dense, SPViT([0.5]))
    with pytest.raises(UsageError, match="targets must be below 10, the number of .*, got 10"):
        finetune(slim, dense, labelled, epochs=1, alpha=0.0 if selectors else 0.5, **QUICK)


def test_a_device_cannot_be_the_output(pair, labelled):
    with pytest.raises(UsageError, match=r"output must be a file, null\.resume\.safetensors goes"):
        finetune(*pair, labelled, epochs=1, output="/dev/null", **QUICK)


@pytest.mark.parametrize(
    "output, rule",
    [
        (".", "must be a file, got the folder"),
        ("missing/x.safetensors", ".*missing does not exist"),
    ],
)
def test_an_output_that_cannot_be_written(pair, labelled, tmp_path, output, rule):
    before = weights(pair[0])
    with pytest.raises(UsageError, match=f"^output {rule}"):
        finetune(*pair, labelled, epochs=1, output=tmp_path / output, **QUICK)
    assert same(weights(pair[0]), before)


def test_paths_beside_the_output_may_be_text():
    assert str(plan_path("f/a.safetensors")) == "f/a.plan.safetensors"
    assert str(resume_path("f/a.safetensors")) == "f/a.resume.safetensors"


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda images: images.byte(), r"\[6, 3, 64, 64\] uint8"),
        (lambda images: images[..., :32], r"\[6, 3, 64, 32\] float32"),
        (lambda images: images[:, :1], r"\[6, 1, 64, 64\] float32"),
    ],
)
def test_images_that_the_models_do_not_take(pair, labelled, change, got):
    wrong = [(change(images), targets) for images, targets in labelled]
    rule = r"images must be \[b, 3, 64, 64\], floating-point, got "
    with pytest.raises(UsageError, match=rule + got):
        finetune(*pair, wrong, epochs=1, **QUICK)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_images_of_any_floating_dtype(pair, labelled, dtype):
    given = [(images.to(dtype), targets) for images, targets in labelled]
    loss = finetune(*pair, given, epochs=1, **QUICK).report["epochs"][0]["loss"]
    assert loss > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": 7}, "the number of classes of dense, 7, got 10"),
        ({"img_size": 32}, r"the image shape of dense, \(3, 32, 32\), got \(3, 64, 64\)"),
    ],
)
def test_models_that_do_not_answer_alike(pair, labelled, options, words):
    dense = timm.create_model("test_vit", **{"img_size": 64, "num_classes": 10} | options)
    with pytest.raises(UsageError, match=f"slim must have {words}"):
        finetune(pair[0], dense, labelled, epochs=1, **QUICK)


def test_a_great_seed(pair, labelled):
    """Epochs count on from it, and NumPy's seeds end at 2³²."""
    finetune(*pair, labelled, epochs=2, seed=2**32 - 1, **QUICK)


def test_a_model_that_is_frozen_is_refused(pair, labelled):
    slim, dense = pair
    with pytest.raises(UsageError, match="a parameter of slim must require .* all are frozen"):
        finetune(slim.requires_grad_(False), dense, labelled, epochs=1, **QUICK)
    slim.head.requires_grad_(True)
    before = weights(slim)
    finetune(slim, dense, labelled, epochs=1, **QUICK)
    changed = {
        name for name, value in weights(slim).items() if not torch.equal(value, before[name])
    }
    assert changed == {"head.weight", "head.bias"}


def test_weights_without_dimensions(tiny_vit, labelled, tmp_path):
    tiny_vit.register_buffer("seen", torch.tensor(3))
    tiny_vit.temperature = torch.nn.Parameter(torch.tensor(2.0))
    slim = apply_masks(tiny_vit, Masks.uniform(6, 0.5, (4, 4)))
    output = tmp_path / "slim.safetensors"
    finetune(slim, tiny_vit, labelled, epochs=1, output=output, **QUICK)
    assert load_file(output)["seen"] == 3


@pytest.mark.parametrize("name", ["slim", "dense"])
def test_weights_must_be_float32(pair, labelled, name):
    slim, dense = pair
    (slim if name == "slim" else dense).bfloat16()
    with pytest.raises(UsageError, match=f"{name} must be in float32 .*, got bfloat16: give"):
        finetune(slim, dense, labelled, **QUICK)
