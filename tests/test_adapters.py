"""Slimmed models whose layers are wrapped, watched or parametrized answer for their weights."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from adapters import Adapted, AdaptedLinear, adapt
from references import bent, build, off, random_images, random_masks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from slimvit import DPS, Absorb, Planner, SPViT, accelerate, apply_masks
from slimvit.errors import UnsupportedModelError

NEAR = 1e-5
COUNTS = (17, 9, 1)


class Largest(Planner):
    kind = "test-adapters-largest"

    def choose(self, layer, view, n):
        return view.top(view.alive.x.norm(dim=-1).t(), n)


PLANS = {
    "drop": random_masks,
    "zero": lambda model: random_masks(model, "zero"),
    "idle": lambda model: random_masks(model, "idle"),
    "absorb": lambda model: Absorb(counts=COUNTS),
    "dps": lambda model: DPS(COUNTS),
    "spvit": lambda model: SPViT((0.7, 0.5), stages=(0, 1)),
    "own": lambda model: Largest(COUNTS),
}
every_plan = pytest.mark.parametrize("plan", list(PLANS.values()), ids=list(PLANS))


def layers(model: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """Of each block the module that holds the layer, and what it calls it."""
    path, _, last = name.rpartition(".")
    return [(block.get_submodule(path), last) for block in model.blocks]


@every_plan
@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("kind", [Adapted, AdaptedLinear])
def test_adapters_count_as_if_they_were_in_the_weights(plan, name, kind):
    model = build("deit")
    slim, images = apply_masks(model, plan(model)).eval(), random_images(model, 3)
    merged, adapters = copy.deepcopy(slim), []
    for (one, last), (other, _) in zip(layers(slim, name), layers(merged, name), strict=True):
        adapters.append(adapt(one, last, kind))
        with torch.no_grad():
            getattr(other, last).weight += adapters[-1].up.weight @ adapters[-1].down.weight
    assert off(slim(images), merged(images)) < NEAR
    slim(images).square().sum().backward()
    assert all(adapter.down.weight.grad.abs().sum() > 0 for adapter in adapters)
    if name != "attn.qkv":  # which is split, so that it must be plain
        with torch.no_grad():
            assert off(accelerate(slim)(images), merged(images)) < NEAR


def untouched(model: nn.Module) -> None:
    pass


def weight_norm(model: nn.Module) -> None:
    for block in model.blocks:
        parametrizations.weight_norm(block.mlp.fc1)


def old_weight_norm(model: nn.Module) -> None:
    for block in model.blocks:
        torch.nn.utils.weight_norm(block.mlp.fc1)


def silent_adapters(model: nn.Module) -> None:
    for block in model.blocks:
        nn.init.zeros_(adapt(block.mlp, "fc1").up.weight)


def watched(model: nn.Module) -> None:
    """As feature extractors do; nothing is changed by it."""
    for block in model.blocks:
        for module in (block, block.norm1, block.norm2, block.mlp, block.mlp.fc1, block.mlp.act):
            module.register_forward_hook(lambda *_: None)


@every_plan
@pytest.mark.parametrize(
    "change", [weight_norm, old_weight_norm, silent_adapters, watched], ids=lambda f: f.__name__
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_what_changes_no_function_changes_no_answer(plan, change):
    model = build("deit")
    slim, images = apply_masks(model, plan(model)).eval(), random_images(model, 3)
    with torch.no_grad():
        wanted = slim(images)
        change(slim)
        assert off(slim(images), wanted) < NEAR


def test_an_activation_of_another_class_is_averaged_over_a_spread():
    class Own(nn.Module):
        def forward(self, x):
            return F.gelu(x)

    model = build("deit")
    slim, images = apply_masks(model, Absorb(counts=COUNTS)).eval(), random_images(model, 3)
    without = copy.deepcopy(slim)
    with torch.no_grad():
        wanted = slim(images)
        for block in slim.blocks:
            block.mlp.act = Own()
        for block in without.blocks:
            block.mlp.forward = lambda y, mlp=block.mlp: mlp.fc2(mlp.act(mlp.fc1(y)))
        assert off(slim(images), wanted) < off(without(images), wanted) / 20
    slim(images).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in slim.parameters())


def hooks(module: nn.Module, seen: list) -> None:
    """One of each kind, which tell the module that they are given."""
    module.register_forward_pre_hook(lambda module, given: seen.append(("before", module)))
    module.register_forward_hook(lambda module, given, made: seen.append(("after", module)))
    module.register_full_backward_pre_hook(lambda module, made: seen.append(("down", module)))
    module.register_full_backward_hook(lambda module, given, made: seen.append(("up", module)))


@every_plan
@pytest.mark.parametrize("name", ["", "norm1", "norm2", "mlp", "mlp.fc1", "attn.proj"])
def test_hooks_run_with_the_module_itself(plan, name):
    model = build("deit")
    slim, images = apply_masks(model, plan(model)).eval(), random_images(model, 2)
    before = slim(images)
    seen: list = []
    for block in slim.blocks:
        hooks(block.get_submodule(name), seen)
    after = slim(images)
    assert off(after, before) < NEAR
    after.sum().backward()
    for block in slim.blocks:
        mine = [kind for kind, module in seen if module is block.get_submodule(name)]
        assert set(mine) == {"before", "after", "down", "up"}
        assert len(mine) == 4 or name in ("norm1", "mlp.fc1")  # called for more than the tokens


@every_plan
def test_hooks_of_blocks_change_what_they_are_given_and_make(plan):
    model = build("deit")
    slim, images = apply_masks(model, plan(model)).eval(), random_images(model, 2)
    with torch.no_grad():
        before = slim(images)
        slim.blocks[1].register_forward_hook(lambda module, given, made: made * 1.5)
        made = slim(images)
        assert off(made, before) > 1e-3
        slim.blocks[1].register_forward_pre_hook(lambda module, given: given[0] * 1.5)
        assert off(slim(images), made) > 1e-3


@every_plan
def test_what_is_not_called_takes_no_hooks(plan):
    model = build("deit")
    slim, images = apply_masks(model, plan(model)).eval(), random_images(model, 2)
    attn = slim.blocks[1].attn
    for name, hook in (
        ("blocks", slim.blocks.register_forward_hook),
        ("block.attn", attn.register_forward_hook),
        ("block.attn", attn.register_full_backward_hook),
    ):
        handle = hook(bent)
        with pytest.raises(UnsupportedModelError, match=rf"{name} has .*ward hooks, which would n"):
            slim(images)
        handle.remove()
    attn.fused_attn = False
    handle = attn.attn_drop.register_forward_hook(bent)
    with pytest.raises(UnsupportedModelError, match=r"attn\.attn_drop has forward hooks, which wo"):
        slim(images)
    handle.remove()
    slim(images)
    slim.blocks[1].forward = lambda x: x
    with pytest.raises(UnsupportedModelError, match="block has a forward set on it, which would n"):
        slim(images)
    slim.blocks[1] = model.blocks[1]
    with pytest.raises(UnsupportedModelError, match="the blocks that it was made with, got Block"):
        slim(images)


@every_plan
@pytest.mark.parametrize("name", ["blocks.1", "blocks.1.mlp", "blocks.1.norm1", "blocks.1.norm2"])
def test_checkpointed_parts_answer_alike(plan, name):
    """By torch's wrapper, which a name in place of a class cannot be told from."""
    model = build("deit")
    slim, images = apply_masks(model, plan(model)), random_images(model, 2)
    wrapped = copy.deepcopy(slim)
    path, _, last = name.rpartition(".")
    inner = wrapped.get_submodule(name)
    setattr(wrapped.get_submodule(path), last, checkpoint_wrapper(inner))
    calls: list = []
    inner.register_forward_pre_hook(lambda *_: calls.append(1))
    got, wanted = wrapped.eval()(images), slim.eval()(images)
    assert off(got, wanted) < NEAR
    for answer in (got, wanted):
        answer.square().sum().backward()
    if name == "blocks.1":
        assert len(calls) == 2  # the second by the backward pass
    gradients = [s.patch_embed.proj.weight.grad.flatten(1) for s in (wrapped, slim)]
    assert off(*gradients) < NEAR


def test_blocks_go_back_to_their_own_classes():
    model = build("deit")
    for plan in PLANS.values():
        slim = apply_masks(model, plan(model))
        for again in (slim, copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
            got = [type(module) for module in again.dense().modules()]
            assert got == [type(module) for module in model.modules()]


@every_plan
def test_quantized_layers_count(plan):
    """In eight bits, so not exactly."""
    model = build("deit")
    slim, images = apply_masks(model, plan(model)).eval(), random_images(model, 3)
    quantized = torch.ao.quantization.quantize_dynamic(slim, {nn.Linear})
    with torch.no_grad():
        assert 1e-6 < off(quantized(images), slim(images)) < 0.1


@pytest.mark.parametrize(
    ("plan", "part"),
    [("drop", ""), ("zero", ""), ("absorb", ""), ("dps", ""), ("absorb", ".mlp"), ("zero", ".mlp")],
)
def test_parts_are_sharded(plan, part, run_from, tmp_path):
    """Each by itself, as FSDP's own examples do: parameters are whole only while it runs."""
    tests = Path(__file__).parent
    lines = run_from(
        tests.parent,
        f"sys.path.append({str(tests)!r})\n"
        "import copy, torch, torch.distributed as dist\n"
        "from torch.distributed.fsdp import fully_shard\n"
        "from references import build, off, random_images\n"
        "from test_adapters import PLANS\n"
        "from slimvit import apply_masks\n"
        f"store = dist.FileStore({str(tmp_path / 'store')!r}, 1)\n"
        "dist.init_process_group('gloo', store=store, rank=0, world_size=1)\n"
        "mesh = dist.device_mesh.init_device_mesh('cpu', (1,))\n"
        "model = build('deit')\n"
        f"slim = apply_masks(model, PLANS[{plan!r}](model)).train()\n"
        "sharded, images = copy.deepcopy(slim), random_images(model, 2)\n"
        f"for block in sharded.blocks: fully_shard(block{part}, mesh=mesh)\n"
        "fully_shard(sharded, mesh=mesh)\n"
        "for run in (slim, sharded): run(images).square().sum().backward()\n"
        "got, wanted = (s.blocks[0].mlp.fc1.weight.grad for s in (sharded, slim))\n"
        "print(off(got.full_tensor(), wanted) < 1e-5)\n",
    )
    assert lines == ["True"]
