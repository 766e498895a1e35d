"""Models that choose their tokens for each image do everything that a module must do."""

import copy
import io
import pickle

import pytest
import torch
from planners import FLOAT32, KINDS, pair, plans
from references import build, off, random_images, randomise
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import Tensor
from tracing import check_compiled, check_exported

from slimvit import DPS, Absorb, SPViT, apply_masks
from slimvit.errors import SlimvitError, UnsupportedModelError
from slimvit.models import spec


class TestModule:
    @pytest.mark.parametrize("kind", KINDS)
    def test_state_dict(self, kind):
        model, slim = pair(kind)
        own = {f"plan.{key}" for key in slim.plan.state_dict()}
        assert set(slim.state_dict()) == set(model.state_dict()) | own
        other = apply_masks(build("deit", seed=4).double(), plans(model)[kind])
        other.load_state_dict(slim.state_dict(), strict=True)
        images = random_images(model, 2)
        assert torch.equal(other(images), slim(images))
        missing, unexpected = model.load_state_dict(slim.state_dict(), strict=False)
        assert not missing
        assert set(unexpected) == own

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_moves(self, kind, dtype):
        model, slim = pair(kind, "dinov2_reg4")
        images = random_images(model, 4)
        with torch.no_grad():
            exact, kept = slim(images), slim.kept_sets(images)
            slim.to(dtype)
            got, sets = slim(images.to(dtype)), slim.kept_sets(images.to(dtype))
        assert got.dtype == dtype
        assert got.isfinite().all()
        same = torch.stack([(a == b).all(1) for a, b in zip(kept, sets, strict=True)]).all(0)
        assert same.any()
        assert dtype == torch.bfloat16 or same.all()
        bound = 0.08 if dtype == torch.bfloat16 else FLOAT32
        assert off(got[same], exact[same]) < bound

    def test_moves_to_another_device(self):
        model, slim = pair("largest")
        slim.to("meta")
        assert slim(random_images(model, 2).to("meta")).shape == (2, 7)

    @pytest.mark.parametrize("kind", KINDS)
    def test_copies(self, kind):
        model, slim = pair(kind, "deit_distilled")
        images = random_images(model, 2)
        with torch.no_grad():
            before = slim(images)
            buffer = io.BytesIO()
            torch.save(slim, buffer)
            buffer.seek(0)
            twins = [
                copy.deepcopy(slim),
                pickle.loads(pickle.dumps(slim)),
                torch.load(buffer, weights_only=False),
            ]
            for twin in twins:
                assert type(twin) is type(slim)
                assert twin.plan.counts == slim.plan.counts
                assert torch.equal(twin(images), before)
                for parameter in twin.parameters():
                    parameter.zero_()
            assert torch.equal(slim(images), before)

    def test_train_and_eval(self):
        _, slim = pair("largest")
        assert not any(module.training for module in slim.modules())
        assert all(module.training for module in slim.train().modules())
        assert not any(module.training for module in slim.eval().modules())

    def test_is_of_its_class(self):
        for name in ("deit", "deit_distilled"):
            model, slim = pair(name=name)
            assert isinstance(slim, type(model))
            assert type(slim).__name__ == f"Dynamic{type(model).__name__}"
            assert "kept=" in repr(slim.plan)

    def test_refuses_what_needs_all_tokens(self):
        model, slim = pair()
        images = random_images(model, 1)
        for call in (slim.forward_intermediates, slim.get_intermediate_layers):
            with pytest.raises(UnsupportedModelError, match="no intermediate features"):
                call(images)
        with pytest.raises(UnsupportedModelError, match="takes no attn_mask"):
            slim(images, attn_mask=torch.ones(17, 17))
        with pytest.raises(UnsupportedModelError, match="belongs to one image size"):
            slim.set_input_size(img_size=96)
        with pytest.raises(SlimvitError, match=r"images must be \[B, 3, 64, 64\], got"):
            slim(images[:, :, 1:])


class TestTraining:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", ["deit3", "deit_distilled"])
    def test_gradients_reach_the_model(self, kind, name):
        model, slim = pair(kind, name)
        slim.train()(random_images(model, 2)).square().sum().backward()
        for key, parameter in slim.named_parameters():
            if key.startswith("plan."):
                continue  # which tokens are kept is no smooth function of these
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.abs().sum() > 0, key

    @pytest.mark.parametrize("kind", ["absorb", "dps", "largest", "spvit"])
    def test_what_wants_a_gradient_gets_one(self, kind):
        """DistributedDataParallel waits for the gradient of every parameter that wants one."""
        model = build("deit")
        named = plans(model) | {"dps": DPS([12, 6, 1]), "spvit": SPViT([0.6], stages=[1])}
        given = named[kind].bind(spec(model)).requires_grad_(True)
        slim = apply_masks(model, given).train()
        slim(random_images(model, 4)).square().sum().backward()
        for key, parameter in slim.named_parameters():
            assert parameter.requires_grad == (parameter.grad is not None), key
        assert all(parameter.requires_grad for parameter in given.parameters())
        assert all(p.requires_grad == (kind == "spvit") for p in slim.plan.parameters())

    @pytest.mark.parametrize("kind", ["absorb", "reverse"])
    def test_gradients_are_right(self, kind):
        """Steps are large for what absorbs, since importance is float32, and small for the rest."""
        model = VisionTransformer(
            img_size=16, patch_size=4, embed_dim=8, depth=3, num_heads=2, num_classes=2
        )
        randomise(model).double()
        slim = apply_masks(model, plans(model)[kind])
        images = random_images(model, 1).requires_grad_()
        parameters = {k: v for k, v in slim.named_parameters() if not k.startswith("plan.")}

        def run(images: Tensor, *values: Tensor) -> Tensor:
            given = dict(zip(parameters, values, strict=True))
            return torch.func.functional_call(slim, given, (images,))

        inputs = (images, *parameters.values())
        options = {"eps": 1e-3, "rtol": 1e-2} if kind == "absorb" else {}
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True, **options)

    @pytest.mark.parametrize("kind", ["absorb", "largest"])
    def test_checkpointing_has_the_same_gradients(self, kind):
        model, slim = pair(kind, "deit3")
        images = random_images(model, 2)
        gradients = []
        for enable in (False, True):
            slim.train().set_grad_checkpointing(enable)
            slim.zero_grad()
            slim(images).square().sum().backward()
            gradients.append([parameter.grad.clone() for parameter in slim.blocks.parameters()])
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))

    @pytest.mark.parametrize("kind", KINDS)
    def test_autocast(self, kind):
        model, slim = pair(kind, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            slim.train()(random_images(model, 4)).float().square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in slim.blocks.parameters())


class TestTracing:
    @pytest.mark.parametrize("kind", ["absorb", "largest"])
    @pytest.mark.usefixtures("fresh_compiler")
    def test_compile(self, kind):
        model, slim = pair(kind, "deit_distilled", torch.float32)
        images = random_images(model, 2)
        check_compiled(slim, images)

    @pytest.mark.usefixtures("fresh_compiler")
    def test_compile_of_selectors(self):
        model = build("deit")
        slim = apply_masks(model, SPViT((0.7, 0.5), stages=(0, 1))).eval()
        check_compiled(slim, random_images(model, 2))

    @pytest.mark.usefixtures("fresh_compiler")
    def test_inductor(self):
        model, slim = pair("absorb", dtype=torch.float32)
        images = random_images(model, 2)
        check_compiled(slim, images, "inductor")

    @pytest.mark.parametrize(
        ("kind", "name"), [("absorb", "deit_distilled"), ("largest", "dinov2_reg4")]
    )
    def test_export_with_a_dynamic_batch(self, kind, name):
        model, slim = pair(kind, name, torch.float32)
        check_exported(slim, model)

    @pytest.mark.parametrize("kind", KINDS)
    def test_vmap(self, kind):
        model, slim = pair(kind, "deit", torch.float32)
        images = random_images(model, 3)
        with torch.no_grad():
            got = torch.func.vmap(lambda image: slim(image[None])[0])(images)
            assert off(got, slim(images)) < FLOAT32

    def test_numbers_of_each_images_own_are_not_vmapped_or_exported(self):
        model = build("deit")
        slim = apply_masks(model, Absorb(counts=[12, 6, 1], thresholds=[0.1] * 3)).eval()
        images = random_images(model, 2)
        with pytest.raises(UnsupportedModelError, match=r"torch\.func would take the numbers"):
            torch.func.vmap(lambda image: slim(image[None])[0])(images)
        with pytest.raises(Exception, match=r"torch\.export would take the numbers"):
            torch.export.export(slim, (images,), strict=False)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
    def test_selectors_are_exported_by_tracing(self):
        """As torch.onnx did before it had torch.export; sizes are tensors there."""
        model = build("deit")
        slim = apply_masks(model, SPViT((0.7, 0.5), stages=(0, 1))).eval()
        file, axes = io.BytesIO(), {"images": {0: "batch"}}
        torch.onnx.export(
            slim,
            (random_images(model, 3),),
            file,
            dynamo=False,
            input_names=["images"],
            dynamic_axes=axes,
        )
        assert file.tell() > 0


@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_timms_optimizers_decay_no_norms_and_biases_of_selectors(tiny_vit, layer_decay):
    """Which are [H, 1, c]: timm leaves out vectors."""
    slim = apply_masks(tiny_vit, SPViT())
    optimizer = create_optimizer_v2(slim, "adamw", weight_decay=0.05, layer_decay=layer_decay)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    wanted = {name: p.ndim > 1 and name.endswith(".weight") for name, p in of_plan(slim)}
    assert {name: id(p) in decayed for name, p in of_plan(slim)} == wanted


def of_plan(slim):
    return slim.plan.named_parameters(prefix="plan")
