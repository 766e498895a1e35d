"""Models whose weights are made anew, computed by hooks, stored in float8, or inference tensors."""

import copy

import pytest
import torch
import torch.nn.utils.prune
from references import MODELS, off, random_images, randomise
from test_apply_masks import slim_pair
from torch import nn

from slimvit.dynamic import Absorb
from slimvit.errors import SlimvitError, UnsupportedModelError
from slimvit.masks import SEMANTICS, Masks
from slimvit.models import copied
from slimvit.runtime import accelerate, apply_masks
from slimvit.search import prune

MASKS = Masks.from_counts((9, 5, 5, 3, 2, 1), (4, 4))
KEPT = [MASKS, Absorb(counts=(12, 9, 6, 4, 3, 1))]
kinds = pytest.mark.parametrize("kept", KEPT, ids=["masks", "absorb"])
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class TestWeightsMadeAnew:
    """What a model computes with besides its state dict is there whenever its weights are."""

    @pytest.mark.parametrize("semantics", SEMANTICS)
    def test_assigned_to_a_model_of_no_memory(self, semantics):
        model, slim = slim_pair("deit3", semantics, torch.float32)
        with torch.device("meta"):
            empty = apply_masks(MODELS["deit3"](), slim.masks).eval()
        empty.load_state_dict(model.state_dict(), assign=True)
        images = random_images(model, 2)
        with torch.no_grad():
            assert torch.equal(empty(images), slim(images))

    @pytest.mark.parametrize("semantics", SEMANTICS)
    @pytest.mark.parametrize("accelerated", [False, True])
    def test_to_empty(self, semantics, accelerated):
        model, slim = slim_pair("deit3", semantics, torch.float32)
        fast = accelerate(model, slim.masks, backend="torch") if accelerated else slim
        images = random_images(model, 2)
        with torch.no_grad():
            right = fast(images)
            again = copy.deepcopy(fast).to("meta").to_empty(device="cpu")
            again.load_state_dict(fast.state_dict())
            assert torch.equal(again(images), right)
            assert torch.equal(again.forward_features(images), fast.forward_features(images))

    def test_shared_memory_stays_shared(self, tiny_vit):
        slim = apply_masks(tiny_vit, MASKS).share_memory()
        assert all(tensor.is_shared() for tensor in (*slim.parameters(), *slim.buffers()))


class TestComputedWeights:
    @pytest.fixture
    def pruned(self, tiny_vit):
        for block in tiny_vit.blocks:
            torch.nn.utils.prune.l1_unstructured(block.mlp.fc1, "weight", 0.5)
        return tiny_vit

    @kinds
    def test_they_are_copied_and_computed_anew(self, pruned, kept):
        slim = apply_masks(pruned, kept).eval()
        plain = _plain(pruned)
        with torch.no_grad():
            right = apply_masks(plain, kept).eval()(IMAGES)
            assert off(slim(IMAGES), right) < 1e-6
            assert off(accelerate(pruned, kept)(IMAGES), right) < 1e-5
            assert off(accelerate(slim)(IMAGES), right) < 1e-5
            pruned.blocks[0].mlp.fc1.weight_orig.zero_()
            assert off(slim(IMAGES), right) < 1e-6  # a copy: nothing is shared

    def test_the_copy_is_trained(self, pruned):
        slim = apply_masks(pruned, MASKS).train()
        slim(IMAGES).square().sum().backward()
        assert slim.blocks[0].mlp.fc1.weight_orig.grad.abs().sum() > 0
        assert pruned.blocks[0].mlp.fc1.weight_orig.grad is None


def _plain(pruned: nn.Module) -> nn.Module:
    """The pruned model with the hooks' weights as parameters."""
    plain = copied(pruned)
    for module in plain.modules():
        if hasattr(module, "weight_orig"):
            torch.nn.utils.prune.remove(module, "weight")
    return plain


@kinds
def test_a_copy_made_in_inference_mode_can_be_trained(tiny_vit, kept):
    with torch.inference_mode():
        inner = randomise(MODELS["deit3"]())  # whose own weights are inference tensors
        slim = apply_masks(tiny_vit, kept)
        dense = apply_masks(inner, Masks.from_counts((9, 5, 1), (4, 4))).dense()
    for model, images in ((slim, IMAGES), (dense, random_images(inner, 2))):
        model.train()(images).square().sum().backward()
        assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


@kinds
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("semantics", ["drop", "zero"])
def test_a_float8_model_computes_in_the_precision_that_is_given(tiny_vit, kept, backend, semantics):
    if isinstance(kept, Masks):
        kept = kept.replace(semantics=semantics)
    stored = copy.deepcopy(tiny_vit).to(torch.float8_e4m3fn)
    fast = accelerate(stored, kept, backend=backend, precision="float32")
    right = accelerate(stored.float(), kept, backend="torch")
    assert off(fast(IMAGES), right(IMAGES)) < 1e-5


def test_images_of_no_memory_have_features_of_their_shape(tiny_vit):
    fast = accelerate(tiny_vit, MASKS, backend="cpu")
    features = fast.forward_features(IMAGES.to("meta"))
    assert (features.device.type, features.shape) == ("meta", (2, 17, 64))


@kinds
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_what_retrieval_reads_of_a_model(tiny_vit, kept, backend):
    fast = accelerate(tiny_vit, kept, backend=backend)
    for name in ("num_features", "embed_dim", "head_hidden_size", "global_pool", "num_classes"):
        assert getattr(fast, name) == getattr(tiny_vit, name)
    assert torch.equal(fast.get_classifier().weight, tiny_vit.get_classifier().weight)
    for name in ("forward_intermediates", "get_intermediate_layers", "set_input_size"):
        with pytest.raises(UnsupportedModelError, match="dense model"):
            getattr(fast, name)(IMAGES)
    with pytest.raises(SlimvitError, match="traced symbolically: use torch.export"):
        torch.fx.symbolic_trace(fast)


def test_computed_weights_are_searched(tiny_vit):
    torch.nn.utils.prune.l1_unstructured(tiny_vit.blocks[0].mlp.fc1, "weight", 0.5)
    masks = prune(tiny_vit, [IMAGES], counts=MASKS.counts, progress=False)
    assert masks == prune(_plain(tiny_vit), [IMAGES], counts=MASKS.counts, progress=False)
