"""An accelerated model among gradients, state dicts, and what is changed after it was made."""

import copy
import pickle

import pytest
import torch
from references import build, off, random_images, random_masks, randomise
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from slimvit import DPS, Absorb, SPViT
from slimvit.data import image_transform
from slimvit.errors import SlimvitError, UnsupportedModelError, UsageError
from slimvit.masks import Masks
from slimvit.runtime import AcceleratedViT, accelerate, apply_masks


def pair(semantics: str = "drop") -> tuple[nn.Module, AcceleratedViT]:
    model = build("deit")
    return model, accelerate(model, random_masks(model, semantics), backend="torch")


@pytest.mark.parametrize("call", ["forward", "forward_features"])
def test_images_that_want_a_gradient(call):
    """They get it from PyTorch, and no kernel leaves it out in silence."""
    model, fast = pair()
    images = random_images(model, 1)
    wanted = torch.func.grad(lambda x: getattr(model, call)(x)[0, 0].sum())(images)
    masks = Masks.dense(3, fast.masks.grid)
    fast = accelerate(model, masks, backend="torch")
    got = torch.func.grad(lambda x: getattr(fast, call)(x)[0, 0].sum())(images)
    assert off(got, wanted) < 1e-4
    fast = accelerate(model, masks, backend="cpu")
    answer = getattr(fast, call)
    with pytest.raises(SlimvitError, match="back end cpu computes no gradients"):
        answer(images.clone().requires_grad_())
    with pytest.raises(SlimvitError, match="back end cpu computes no gradients"):
        torch.func.jvp(answer, (images,), (images,))
    with torch.no_grad():
        assert torch.equal(answer(images.clone().requires_grad_()), answer(images))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_no_images(backend):
    fast = accelerate(build("deit"), random_masks(build("deit")), backend=backend)
    for call in (fast, fast.forward_features):
        with pytest.raises(SlimvitError, match="images must be a tensor, got NoneType"):
            call(None)
    with pytest.raises(SlimvitError, match="images must be a tensor, got int"):
        fast.kept_sets(5)
    with pytest.raises(
        SlimvitError, match=r"images must be \[B, 3, 64, 64\], got \[2, 1, 64, 64\]"
    ):
        fast.kept_sets(torch.zeros(2, 1, 64, 64))
    with pytest.raises(SlimvitError, match="images must be a dense tensor, got torch.sparse_coo"):
        fast(torch.zeros(2, 3, 64, 64).to_sparse())
    with pytest.raises(SlimvitError, match="batch_size must be a whole number, got None"):
        fast.warm_up(None)
    with pytest.raises(SlimvitError, match="batch_size must be at least 1, got 0"):
        fast.warm_up(0)


def test_tangents_reach_through_packed_weights():
    model, fast = pair()
    slim, images = apply_masks(model, fast.masks).eval(), random_images(model, 1)
    with sdpa_kernel(SDPBackend.MATH):
        got, wanted = (torch.func.jvp(f, (images,), (images,))[1] for f in (fast, slim))
    assert off(got, wanted) < 1e-4


def test_every_weight_gets_the_gradient_that_it_wants():
    model, fast = pair()
    fast.requires_grad_(True)(random_images(model, 1)).sum().backward()
    assert [name for name, p in fast.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("semantics", ["drop", "zero", "idle"])
def test_a_state_dict_holds_all_that_it_computes_with(semantics):
    one, fast = pair(semantics)
    two = randomise(copy.deepcopy(one), 3)
    other = accelerate(two, fast.masks, backend="torch")
    fast.load_state_dict(other.state_dict())
    images = random_images(one, 2)
    assert torch.equal(fast(images), other(images))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_masks_that_are_written_to_later(backend):
    model = build("deit")
    masks, images = random_masks(model), random_images(model, 2)
    fast = accelerate(model, masks, backend=backend)
    wanted = fast.kept_sets(images)
    masks.keep[:, -3:] = ~masks.keep[:, -3:]
    assert all(map(torch.equal, fast.kept_sets(images), wanted))


def same(fast: AcceleratedViT) -> AcceleratedViT:
    return fast


def pickled(fast: AcceleratedViT) -> AcceleratedViT:
    return pickle.loads(pickle.dumps(fast))


@pytest.mark.parametrize("copied", [same, copy.deepcopy, pickled])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("plan", [None, Absorb(counts=[12, 8, 1])])
def test_a_head_that_changes_later(plan, backend, copied):
    model = build("deit")
    images, plan = random_images(model, 2), plan or random_masks(model)
    fast = copied(accelerate(model, plan, backend=backend))
    before = fast(images)
    for name in ("weight", "bias"):
        getattr(fast.network.head, name).mul_(2)
        fast = copied(fast)
    assert off(fast(images), 2 * before) < 1e-5
    fast.network.reset_classifier(3)
    features = fast.forward_features(images)
    assert fast.num_classes == fast(images).shape[1] == 3
    assert off(fast(images), fast.forward_head(features)) < 1e-5


PLANS = {
    "masks": lambda: random_masks(build("deit"), "zero"),
    "absorb": lambda: Absorb(counts=[12, 8, 1]),
    "spvit": lambda: SPViT((0.7, 0.5), stages=(0, 1)),
    "dps": lambda: DPS([12, 8, 1]),
}


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("name", PLANS)
def test_what_was_trained_is_accelerated_with_its_own_plan(name, backend):
    model, images = build("deit"), random_images(build("deit"), 3)
    slim = apply_masks(model, PLANS[name]())
    with torch.no_grad():
        for seed, parameter in enumerate(slim.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.add_(0.01 * noise)
    before = {key: value.clone() for key, value in slim.state_dict().items()}
    fast = accelerate(slim, backend=backend)
    assert off(fast(images), slim.eval()(images)) < 1e-4
    dense = slim.dense()
    assert type(dense) is type(model)
    assert dense.state_dict().keys() == model.state_dict().keys()
    again = apply_masks(dense, getattr(slim, "plan", None) or slim.masks).eval()
    assert torch.equal(again(images), slim(images))
    assert all(torch.equal(value, before[key]) for key, value in slim.state_dict().items())


def test_a_dense_model_alone_is_refused():
    model, fast = pair()
    with pytest.raises(UsageError, match="masks must be given with a dense model, got VisionTrans"):
        accelerate(model)
    with pytest.raises(UnsupportedModelError, match="is folded: no dense one is left"):
        fast.network.dense()
    with pytest.raises(UsageError, match="a Planner or a file of either, got VisionTransformer$"):
        accelerate(fast.masks, model)
    with pytest.raises(UnsupportedModelError, match="model must be a timm VisionTrans.*, got str"):
        accelerate("deit", fast.masks)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_preprocessing_stays_known(backend):
    model = build("deit")
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.5,) * 3}
    fast = accelerate(model, random_masks(model), backend=backend)
    assert resolve_model_data_config(fast) == resolve_model_data_config(model)
    assert repr(image_transform(fast)) == repr(image_transform(model))


class TestLoading:
    def saved(self, tmp_path, plan=None):
        model = build("deit")
        fast = accelerate(model, plan or random_masks(model), backend="cpu")
        torch.save(fast, tmp_path / "fast.pt")
        return fast, random_images(model, 2)

    @pytest.mark.parametrize("plan", [None, Absorb(counts=[12, 6, 1])], ids=["masks", "absorb"])
    def test_to_another_device_is_refused(self, plan, tmp_path):
        self.saved(tmp_path, plan)
        with pytest.raises(SlimvitError, match="computes on the CPU, got weights to load to meta"):
            torch.load(tmp_path / "fast.pt", weights_only=False, map_location="meta")

    @pytest.mark.parametrize("mmap", [False, True])
    def test_in_inference_mode(self, mmap, tmp_path):
        fast, images = self.saved(tmp_path)
        with torch.inference_mode():
            loaded = torch.load(tmp_path / "fast.pt", weights_only=False, mmap=mmap)
            for other in (loaded, copy.deepcopy(loaded), copy.deepcopy(fast)):
                assert torch.equal(other(images), fast(images))
