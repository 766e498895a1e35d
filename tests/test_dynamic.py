"""Models that choose their tokens for each image: answers, kept sets, and who chooses."""

import pytest
import torch
from planners import EXACT, FLOAT32, KINDS, Largest, falling, pair, plans
from references import MODELS, build, off, random_images, random_masks

from slimvit import Absorb, Planner, accelerate, apply_masks, load_plan
from slimvit.backends import why_not
from slimvit.dynamic import DPS, SPViT, Static
from slimvit.errors import PlanError, SlimvitError, UnsupportedModelError
from slimvit.macs import cut, gmacs
from slimvit.masks import Masks
from slimvit.models import spec


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
        with pytest.raises(PlanError, match="; prefix must be 1, got 5"):
            apply_masks(other, slim.plan)
        again = apply_masks(build("deit", seed=3), slim.plan)
        assert again.plan.counts == slim.plan.counts

    @pytest.mark.parametrize("kind", KINDS)
    def test_bound_to_a_model_of_other_classes(self, kind):
        model, slim = pair(kind, "deit")
        images = random_images(model, 2)
        model.reset_classifier(3)
        again = apply_masks(model, slim.plan)
        assert again.plan.spec == spec(model) and again(images).shape == (2, 3)
        assert torch.equal(
            torch.cat(again.kept_sets(images), 1), torch.cat(slim.kept_sets(images), 1)
        )


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
        with pytest.raises(PlanError, match="Other needs another kind: 'static' is that of masks"):
            type("Other", (Planner,), {"kind": "static"})
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


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("kind", ["masks", "absorb", "thresholds", "dps", "spvit", "argmax"])
def test_no_images(backend, kind):
    if backend == "cpu" and (reason := why_not("cpu", "cpu", torch.float32)) is not None:
        pytest.skip(reason)
    model, counts = build("deit"), [12, 6, 1]
    plan = {
        "masks": random_masks(model),
        "absorb": Absorb(counts=counts),
        "thresholds": Absorb(counts=counts, thresholds=[0.1] * 3),
        "dps": DPS(counts),
        "spvit": SPViT([0.6, 0.3], stages=[0, 1]),
        "argmax": SPViT([0.6, 0.3], stages=[0, 1], argmax=True),
    }[kind]
    fast = accelerate(model, plan, backend=backend)
    none = random_images(model, 2)[:0]
    assert fast(none).shape == (0, 7)
    assert fast.forward_features(none).shape == (0, 17, 48)
