"""Models that choose their tokens for each image, and everything that a module must do."""

import copy
import io
import pickle

import pytest
import timm
import torch
from references import MODELS, build, off, random_images, random_masks, randomise
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from slimvit import Absorb, Planner, accelerate, apply_masks, load_plan
from slimvit.dynamic import Choice, Static, View
from slimvit.errors import PlanError, SlimvitError, UnsupportedModelError
from slimvit.macs import cut, gmacs
from slimvit.masks import Masks
from slimvit.models import spec

EXACT = 1e-11
FLOAT32 = 1e-5


class Largest(Planner):
    """The forty lines that a user writes: the tokens of the largest weighted norm."""

    kind = "test-largest"

    def __init__(self, counts, *, width: int, power: float = 1.0) -> None:
        super().__init__(counts)
        self.width, self.power = width, power
        self.weight = nn.Parameter(torch.linspace(0.1, 1, width))

    def choose(self, layer: int, view: View, n: int) -> Choice:
        weighted = view.alive.x * self.weight
        return view.top(weighted.norm(dim=-1).t() ** self.power, n)

    def settings(self):
        return super().settings() | {"width": self.width, "power": self.power}

    def macs(self, spec) -> int:
        pairs = zip(self.alive, self.counts, strict=True)
        return sum(m * self.width for m, n in pairs if self.prefix < n < m)


class Reverse(Largest):
    """The last patches, by a rule without weights."""

    kind = "test-reverse"

    def choose(self, layer: int, view: View, n: int) -> Choice:
        return view.top(view.alive.place, n)


def falling(model: nn.Module, last: int | None = None) -> list[int]:
    """Counts that fall by about a third of the patches from block to block."""
    shape = spec(model)
    counts = [shape.prefix + max(1, shape.patches * 2**i // 3**i) for i in range(1, shape.depth)]
    return [*counts, shape.head_tokens if last is None else last]


def plans(model: nn.Module, last: int | None = None) -> dict[str, Planner]:
    counts = falling(model, last)
    return {
        "absorb": Absorb(counts=counts),
        "largest": Largest(counts, width=spec(model).width),
        "reverse": Reverse(counts, width=spec(model).width),
    }


def pair(
    kind: str = "absorb", name: str = "deit", dtype: torch.dtype = torch.float64, last=None
) -> tuple[nn.Module, nn.Module]:
    model = build(name).to(dtype)
    return model, apply_masks(model, plans(model, last)[kind])


KINDS = ("absorb", "largest", "reverse")


class TestAnswers:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_keeping_all_answers_like_timm(self, name, kind):
        model = build(name).double()
        shape = spec(model)
        plan = plans(model)[kind]
        plan.counts = (shape.tokens,) * shape.depth
        slim = apply_masks(model, plan)
        images = random_images(model, 3)
        with torch.no_grad():
            assert off(slim(images), model(images)) < EXACT
            features = model.forward_features(images)
            assert off(slim.forward_features(images), features) < EXACT
            assert off(slim.forward_head(features), model.forward_head(features)) < EXACT

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("seed", [0, 1])
    def test_static_is_apply_masks(self, poison_empty, name, seed):
        model = build(name).double()
        keep = random_masks(model, seed=seed).keep
        shape = spec(model)
        if keep[-1, shape.prefix :].any():
            keep[-1, : shape.prefix] = True
        masks = Masks(keep, shape.prefix, shape.grid)
        slim, same = apply_masks(model, masks), apply_masks(model, Static(masks))
        images = random_images(model, 3)
        with torch.no_grad():
            assert off(same(images), slim(images)) < EXACT
            assert off(same.forward_features(images), slim.forward_features(images)) < EXACT
            kept = same.kept_sets(images)
        for row, sets in zip(masks.keep, kept, strict=True):
            assert torch.equal(sets, row.nonzero()[:, 0].expand(3, -1))

    @pytest.mark.parametrize("kind", ["largest", "reverse"])
    def test_each_block_is_timms_on_the_kept_tokens(self, kind):
        """Where nothing is absorbed: timm's blocks on each image's own tokens, one by one."""
        model, slim = pair(kind, "deit3")
        images = random_images(model, 3)
        with torch.no_grad():
            kept, got = slim.kept_sets(images), slim(images)
            for b, image in enumerate(images):
                x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))
                places = torch.arange(x.shape[1])
                for block, sets in zip(model.blocks, kept, strict=True):
                    stay = torch.isin(places, sets[b])
                    x, places = block(x)[:, stay], places[stay]
                wanted = model.forward_head(model.norm(x))
                assert off(got[b : b + 1], wanted) < EXACT

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("batch", [0, 1, 3])
    def test_images_are_independent(self, kind, batch):
        model, slim = pair(kind, "deit_distilled")
        images = random_images(model, 5)
        with torch.no_grad():
            together, part = slim(images), slim(images[:batch])
            sets, some = slim.kept_sets(images), slim.kept_sets(images[:batch])
        assert part.shape == (batch, 7)
        assert batch == 0 or off(part, together[:batch]) < EXACT
        for all_of_them, theirs in zip(sets, some, strict=True):
            assert torch.equal(all_of_them[:batch], theirs)


class TestKeptSets:
    @pytest.mark.parametrize("name", ["deit", "deit_distilled", "dinov2_reg4", "oblong"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_nested_ascending_and_as_many_as_planned(self, name, kind):
        model, slim = pair(kind, name)
        shape = spec(model)
        kept = slim.kept_sets(random_images(model, 4))
        before = torch.arange(shape.tokens).expand(4, -1)
        for layer, sets in enumerate(kept):
            assert sets.shape == (4, slim.plan.counts[layer])
            assert sets.dtype == torch.int64
            assert (sets.diff(dim=1) > 0).all()
            prefix = min(shape.prefix, sets.shape[1])
            assert torch.equal(sets[:, :prefix], torch.arange(prefix).expand(4, -1))
            for row, rows_before in zip(sets.tolist(), before.tolist(), strict=True):
                assert set(row) <= set(rows_before)
            before = sets

    def test_images_have_sets_of_their_own(self):
        model, slim = pair("absorb")
        kept = slim.kept_sets(random_images(model, 8))
        assert len({tuple(row) for row in kept[0].tolist()}) > 1

    @pytest.mark.parametrize("name", ["deit", "dinov2_reg4"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_features_stand_in_their_places(self, name, kind):
        model = build(name).double()
        shape = spec(model)
        slim = apply_masks(model, plans(model, shape.prefix + 3)[kind])
        images = random_images(model, 3)
        with torch.no_grad():
            features, kept = slim.forward_features(images), slim.kept_sets(images)[-1]
            tokens = slim._slim_tokens(images).x.transpose(0, 1)
        assert features.shape == (3, shape.tokens, shape.width)
        for b in range(3):
            assert torch.equal(features[b, kept[b]], tokens[b])
            elsewhere = torch.ones(shape.tokens, dtype=torch.bool)
            elsewhere[kept[b]] = False
            assert (features[b, elsewhere] == 0).all()

    @pytest.mark.parametrize("name", ["deit", "deit_distilled", "fc_norm", "no_classes"])
    def test_forward_is_head_of_features(self, name):
        model, slim = pair("absorb", name)
        images = random_images(model, 2)
        with torch.no_grad():
            assert off(slim(images), slim.forward_head(slim.forward_features(images))) < EXACT


class TestGivenModelAndPlan:
    def test_are_never_changed(self):
        model = build("deit")
        plan = Largest(falling(model), width=48)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        slim = apply_masks(model, plan)
        with torch.no_grad():
            for parameter in slim.parameters():
                parameter.add_(1)
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert torch.equal(plan.weight, torch.linspace(0.1, 1, 48))
        assert plan.spec is None
        assert not hasattr(model, "plan")

    def test_the_plan_follows_the_model(self):
        """Its dtype, its device and its mode: a planner may do otherwise in training."""
        model = build("deit").double()
        for training in (False, True):
            slim = apply_masks(model.train(training), plans(model)["largest"])
            assert slim.plan.training == training
            assert slim.plan.weight.dtype == torch.float64
        slim = apply_masks(model.to("meta"), plans(model)["largest"])
        assert slim.plan.weight.is_meta

    def test_a_path_does_too(self, tmp_path):
        model, slim = pair("absorb")
        slim.plan.save(tmp_path / "p.safetensors")
        again = apply_masks(model, str(tmp_path / "p.safetensors"))
        images = random_images(model, 2)
        assert torch.equal(again(images), slim(images))

    def test_slimmed_already(self):
        _, slim = pair()
        with pytest.raises(UnsupportedModelError, match="slimmed already"):
            apply_masks(slim, Absorb(cut=0.3))

    def test_bound_to_another_model(self):
        other = build("dinov2_reg4")
        _, slim = pair("absorb")
        with pytest.raises(PlanError, match="the plan is of .*17 tokens.*, got .*21 tokens"):
            apply_masks(other, slim.plan)
        again = apply_masks(build("deit", seed=3), slim.plan)
        assert again.plan.counts == slim.plan.counts


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
    def test_compile(self, kind):
        model, slim = pair(kind, "deit_distilled", torch.float32)
        images = random_images(model, 2)
        with torch.no_grad():
            compiled = torch.compile(slim, fullgraph=True, backend="aot_eager")
            assert off(compiled(images), slim(images)) < FLOAT32

    def test_inductor(self):
        model, slim = pair("absorb", dtype=torch.float32)
        images = random_images(model, 2)
        with torch.no_grad():
            compiled = torch.compile(slim, fullgraph=True)
            assert off(compiled(images), slim(images)) < FLOAT32

    @pytest.mark.parametrize(
        ("kind", "name"), [("absorb", "deit_distilled"), ("largest", "dinov2_reg4")]
    )
    def test_export_with_a_dynamic_batch(self, kind, name):
        model, slim = pair(kind, name, torch.float32)
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(slim, (random_images(model, 2),), dynamic_shapes=shapes)
        for batch in (1, 3, 7):
            images = random_images(model, batch, seed=batch)
            with torch.no_grad():
                assert off(program.module()(images), slim(images)) < FLOAT32


class TestAccelerate:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", ["deit", "dinov2_reg4", "fc_norm"])
    def test_torch_answers_like_apply_masks(self, kind, name):
        model, slim = pair(kind, name, torch.float32)
        fast = accelerate(model, slim.plan, backend="torch")
        images = random_images(model, 3)
        assert off(fast(images), slim(images)) < FLOAT32
        assert off(fast.forward_features(images), slim.forward_features(images)) < FLOAT32
        for got, wanted in zip(fast.kept_sets(images), slim.kept_sets(images), strict=True):
            assert torch.equal(got, wanted)
        assert fast.plan.counts == slim.plan.counts
        assert fast.masks is None
        assert str(list(slim.plan.counts))[1:-1] in repr(fast)

    def test_another_back_end_says_why_not(self):
        model = build("deit")
        with pytest.raises(SlimvitError, match="cpu has no kernels for the planner test-largest"):
            accelerate(model, plans(model)["largest"], backend="cpu")
        fast = accelerate(model, plans(model)["largest"])
        assert fast.backend == "torch"

    def test_masks_have_kept_sets_too(self):
        model = build("deit")
        masks = random_masks(model)
        kept = accelerate(model, masks, backend="torch").kept_sets(random_images(model, 2))
        for row, sets in zip(masks.keep, kept, strict=True):
            assert torch.equal(sets, row.nonzero()[:, 0].expand(2, -1))


class TestCustomPlanner:
    def test_work_of_its_own_counts(self):
        model, slim = pair("largest")
        shape, plan = spec(model), slim.plan
        masks = Masks.from_counts(plan.counts, shape.grid, shape.prefix)
        own = sum(
            m * 48 for m, n in zip((17, *plan.counts), plan.counts, strict=False) if 1 < n < m
        )
        assert gmacs(shape, plan) - gmacs(shape, masks) == pytest.approx(own / 1e9)
        assert cut(shape, plan) == 1 - gmacs(shape, plan) / gmacs(shape)

    def test_is_saved_and_read_by_name(self, tmp_path):
        model, slim = pair("largest", dtype=torch.float32)
        with torch.no_grad():
            slim.plan.weight.copy_(torch.rand(48))
        slim.plan.save(tmp_path / "p.safetensors")
        plan = load_plan(tmp_path / "p.safetensors")
        assert type(plan) is Largest
        assert torch.equal(plan.weight, slim.plan.weight)
        images = random_images(model, 2)
        assert torch.equal(accelerate(model, plan, backend="torch")(images), slim(images))

    def test_a_kind_is_taken_once(self):
        with pytest.raises(PlanError, match="the kind 'absorb' is taken by .*Absorb"):
            type("Other", (Planner,), {"kind": "absorb"})
        assert Planner.kinds["absorb"] is Absorb

    def test_a_choice_without_a_name(self, tmp_path):
        model = build("deit")

        class Nameless(Planner):
            def choose(self, layer, view, n):
                return view.top(view.alive.x.norm(dim=-1).t(), n)

        plan = Nameless(falling(model))
        assert apply_masks(model, plan)(random_images(model, 1)).shape == (1, 7)
        with pytest.raises(PlanError, match="Nameless has no kind"):
            plan.save(tmp_path / "p.safetensors")
        assert list(tmp_path.iterdir()) == []


class TestCounts:
    @pytest.mark.parametrize(
        ("counts", "words"),
        [
            ([17, 9], "one for each of 3 blocks, got 2"),
            ([18, 9, 1], r"N = 17 or less .*got \[18, 9, 1\]"),
            ([9, 12, 1], "not grow with depth"),
            ([9, 0, 0], "keep the 1 prefix tokens"),
            ([9, 5, 0], "the 1 that the head reads"),
            ([9.5, 5, 1], r"whole numbers, got \[9.5, 5, 1\]"),
        ],
    )
    def test_that_do_not_fit(self, counts, words):
        model = build("deit")
        with pytest.raises(PlanError, match=words):
            apply_masks(model, Absorb(counts=counts))

    def test_missing(self):
        with pytest.raises(PlanError, match="test-largest: counts are missing"):
            apply_masks(build("deit"), Largest(None, width=48))

    def test_unbound(self):
        with pytest.raises(PlanError, match="absorb: bind it to a model first"):
            _ = Absorb(counts=[1]).alive


class TestAbsorb:
    @pytest.mark.parametrize("wanted", [0.1, 0.25, 0.45, 0.6])
    @pytest.mark.parametrize(
        "name",
        ["deit_tiny_patch16_224", "deit_small_distilled_patch16_224", "vit_base_patch32_224"],
    )
    def test_saves_what_is_asked_for(self, wanted, name):
        with torch.device("meta"):
            shape = spec(timm.create_model(name))
        plan = Absorb(cut=wanted).bind(shape)
        found = cut(shape, plan)
        assert wanted <= found < wanted + 0.02
        assert plan.counts[0] == shape.tokens
        assert plan.counts[-1] == shape.head_tokens
        assert plan.bind(shape).counts == plan.counts
        assert Absorb(counts=plan.counts).bind(shape).counts == plan.counts

    @pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, float("nan")])
    def test_cuts_out_of_range(self, value):
        with pytest.raises(PlanError, match=r"cut must lie in \(0, 1\), got"):
            Absorb(cut=value)

    def test_a_cut_out_of_reach(self):
        with pytest.raises(PlanError, match=r"cut must be at most 0\.\d+ for .*, got 0.95"):
            apply_masks(build("deit"), Absorb(cut=0.95))

    def test_one_of_cut_and_counts(self):
        for arguments in ({}, {"cut": 0.4, "counts": [1]}):
            with pytest.raises(PlanError, match="give one of cut and counts"):
                Absorb(**arguments)

    def test_sizes_grow_by_what_is_absorbed(self):
        model = build("deit")
        slim = apply_masks(model, Absorb(counts=[12, 6, 5]))
        with torch.no_grad():
            left = slim.trace(random_images(model, 3))[1]
        for alive in left:
            assert (alive.size[:, 0] == 1).all()  # nothing goes into the class token
            assert (alive.size >= 1).all()
            assert (alive.size.sum(1) <= 17).all()  # a token counts for itself at most
            assert (alive.size.sum(1) > alive.size.shape[1]).all()


class TestStatic:
    @pytest.mark.parametrize("semantics", ["zero", "idle"])
    def test_other_semantics(self, semantics):
        masks = random_masks(build("deit"), semantics)
        with pytest.raises(PlanError, match=f"semantics 'drop', got '{semantics}'"):
            Static(masks)

    def test_of_another_model(self):
        masks = random_masks(build("dinov2_reg4"))
        with pytest.raises(PlanError, match=r"keep must be \[L, N\] = \[3, 17\].*got \[3, 21\]"):
            apply_masks(build("deit"), Static(masks))

    def test_registers_pruned_ahead_of_patches(self):
        model = build("dinov2_reg4")
        keep = torch.ones(3, 21, dtype=torch.bool)
        keep[-1, 1:5] = False
        with pytest.raises(PlanError, match="all 5 prefix tokens or no patch"):
            apply_masks(model, Static(Masks(keep, 5, (4, 4))))
