"""Models that are changed or trained once they are slimmed: no call answers as before."""

import copy
import functools

import pytest
import torch
import torch.nn.utils.parametrize
from adapters import adapt
from references import bent, build, off, random_images, random_masks, randomise
from torch import nn

from slimvit import Absorb, SPViT, accelerate, apply_masks
from slimvit.errors import UnsupportedModelError

NEAR = 1e-5
COUNTS = (17, 9, 1)


def fast_and_images(backend: str) -> tuple[nn.Module, torch.Tensor]:
    model = build("deit")
    return accelerate(model, random_masks(model), backend=backend), random_images(model, 2)


def hook(module: nn.Module, name: str) -> None:
    getattr(module, name).register_forward_hook(bent)


def replace(module: nn.Module, name: str) -> None:
    setattr(module, name, nn.Hardtanh(-0.1, 0.1))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrize(module: nn.Module, name: str) -> None:
    torch.nn.utils.parametrize.register_parametrization(
        getattr(module, name), "weight", Doubled(), unsafe=True
    )


def set_forward(module: nn.Module, name: str) -> None:
    getattr(module, name).forward = lambda tokens: tokens[:, :7].sin()


@pytest.mark.parametrize("name", ["blocks.1", "blocks.0.qkv", "blocks.2.fc2"])
def test_hooks_on_what_is_accelerated_run(name):
    fast, images = fast_and_images("torch")
    before = fast(images)
    fast.network.get_submodule(name).register_forward_hook(bent)
    assert off(fast(images), before) > 1e-3


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("head", adapt),
        ("head", hook),
        ("head", set_forward),
        ("head", parametrize),
        ("fc_norm", hook),
        ("fc_norm", replace),
        ("head_drop", replace),
    ],
)
@pytest.mark.parametrize("copied", [lambda fast: fast, copy.deepcopy])
def test_a_head_does_more_later(name, change, copied):
    fast, images = fast_and_images("cpu")
    before = fast(images)
    change(fast.network, name)
    fast = copied(fast)
    assert off(fast(images), before) > 1e-3
    assert off(fast(images), fast.forward_head(fast.forward_features(images))) < NEAR


@pytest.mark.parametrize("fused", [False, True])
def test_a_head_is_trained(fused):
    fast, images = fast_and_images("cpu")
    fast.network.head.requires_grad_(True)
    optimizer = torch.optim.SGD(fast.network.head.parameters(), lr=0.5, fused=fused)
    fast(images).square().sum().backward()
    assert fast.network.head.weight.grad.abs().sum() > 0
    optimizer.step()
    with torch.no_grad():
        assert off(fast(images), fast.forward_head(fast.forward_features(images))) < NEAR


def test_a_quantized_head_is_called():
    fast, images = fast_and_images("cpu")
    before = fast(images)
    torch.ao.quantization.quantize_dynamic(fast, {nn.Linear}, inplace=True)
    assert 0 < off(fast(images), before) < 0.05


class TestPackedWeights:
    """The `torch` back end packs weights once, and anew when they have changed."""

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
    def test_that_are_trained(self, optimizer, fused):
        """Fused optimizers count no versions."""
        fast, images = fast_and_images("torch")
        with torch.no_grad():
            before = fast(images)
        fast.requires_grad_(True)
        steps = optimizer(fast.parameters(), lr=0.05, fused=fused)
        for _ in range(2):
            fast(images).square().mean().backward()
            steps.step()
            with torch.no_grad():
                assert off(fast(images), before) > 1e-3
                assert off(fast(images), copy.deepcopy(fast)(images)) < NEAR

    def test_that_are_transposed(self):
        fast, images = fast_and_images("torch")
        before = fast(images)
        for block in fast.network.blocks:
            block.proj.weight = nn.Parameter(block.proj.weight.t(), requires_grad=False)
        assert off(fast(images), before) > 1e-3
        assert off(fast(images), copy.deepcopy(fast)(images)) < NEAR

    @pytest.mark.parametrize("semantics", ["drop", "zero"])
    def test_of_several_models_at_once(self, semantics):
        model = build("deit")
        twins = [
            accelerate(
                randomise(copy.deepcopy(model)), random_masks(model, semantics), backend="torch"
            )
            for _ in range(2)
        ]
        images = random_images(model, 2)
        weights = torch.func.stack_module_state(twins)
        answer = functools.partial(torch.func.functional_call, twins[0])
        with torch.no_grad():
            got = torch.vmap(lambda p, b: answer((p, b), (images,)))(*weights)
            for one, twin in zip(got, twins, strict=True):
                assert off(one, twin(images)) < NEAR

    def test_of_another_call_are_not_taken_for_these(self):
        fast, images = fast_and_images("torch")
        for scale in torch.linspace(0.5, 1.5, 12):
            weights = {name: scale * value for name, value in fast.state_dict().items()}
            got = torch.func.functional_call(fast, weights, (images,))
            twin = copy.deepcopy(fast)
            twin.load_state_dict(weights)
            assert off(got, twin(images)) < NEAR

    def test_that_are_replaced(self):
        fast, images = fast_and_images("torch")
        for step in range(6):
            for parameter in fast.parameters():
                parameter.data = parameter.data * 1.01
                if step % 2:
                    parameter.data = parameter.data * 1.01
            twin = copy.deepcopy(fast)
            assert off(fast(images), twin(images)) < NEAR

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
    @pytest.mark.parametrize("semantics", ["drop", "zero", "idle"])
    def test_are_no_constants_of_a_trace(self, semantics):
        model = build("deit")
        fast = accelerate(model, random_masks(model, semantics), backend="torch")
        traced = torch.jit.trace(fast, random_images(model, 2))
        images = random_images(model, 5, seed=1)
        assert off(traced(images), fast(images)) < NEAR

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
    def test_selectors_are_traced(self):
        model = build("deit")
        plan = SPViT((0.7, 0.5), stages=(0, 1))
        for slim in (apply_masks(model, plan).eval(), accelerate(model, plan, backend="torch")):
            traced = torch.jit.trace(slim, random_images(model, 2))
            images = random_images(model, 5, seed=1)
            assert off(traced(images), slim(images)) < NEAR

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
    def test_numbers_of_patches_of_each_images_own_are_not_traced(self):
        model = build("deit")
        plan = Absorb(counts=COUNTS, thresholds=[0.1] * 3)
        for slim in (apply_masks(model, plan).eval(), accelerate(model, plan, backend="torch")):
            with pytest.raises(UnsupportedModelError, match="torch.jit.trace would take the"):
                torch.jit.trace(slim, random_images(model, 1))
