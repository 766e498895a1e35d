"""SPViT: its selectors, what they remove and package, and its file."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from references import build, off, random_images

import slimvit
from slimvit import models
from slimvit.dynamic.selector import Selector
from slimvit.errors import PlanError
from slimvit.macs import gmacs

KEEP, STAGES = (0.7, 0.4), (0, 1)


def slimmed(name="deit", keep=KEEP, stages=STAGES, seed=3, **options):
    """A model of `references` in float64 with random selectors that choose, in eval mode."""
    model = build(name).double()
    slim = slimvit.apply_masks(model, slimvit.SPViT(keep, stages=stages, **options)).double()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in slim.plan.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return slim.eval()


def naive_logits(selector, x, policy):
    """The selector's logits of tokens x [p, D] of one image, token by token, head by head."""
    heads, c = selector.heads, x.shape[1] // selector.heads
    rows = [[token[h * c : (h + 1) * c] for token in x] for h in range(heads)]
    judged, alive = [], [i for i in range(len(x)) if policy[i] > 0]
    for h in range(heads):
        y = [F.layer_norm(row, (c,), eps=1e-6) for row in rows[h]]
        y = [v * selector.norm_weight[h, 0] + selector.norm_bias[h, 0] for v in y]
        y = [F.gelu(v @ selector.embed.weight[h] + selector.embed.bias[h, 0]) for v in y]
        local = (c + 1) // 2
        mean = sum(y[i][local:] for i in alive) / len(alive)
        y = [torch.cat([v[:local], mean]) for v in y]
        for layer, last in ((selector.judge1, 0), (selector.judge2, 0), (selector.judge3, 1)):
            y = [v @ layer.weight[h] + layer.bias[h, 0] for v in y]
            y = y if last else [F.gelu(v) for v in y]
        judged.append([v.log_softmax(-1) for v in y])
    out = []
    for i in range(len(x)):
        means = torch.stack([rows[h][i].mean() for h in range(heads)])
        w = selector.weigh2(F.gelu(selector.weigh1(means))).sigmoid()
        out.append(sum(w[h] * judged[h][i] for h in range(heads)) / w.sum())
    return torch.stack(out)


@pytest.mark.parametrize("shift", [0.0, -90.0, -300.0])  # of how much every head counts
@pytest.mark.parametrize("width, heads, p", [(48, 3, 7), (15, 3, 1), (10, 1, 4), (6, 6, 5)])
def test_selector_is_the_naive_loop(width, heads, p, shift):
    torch.manual_seed(p)
    selector = Selector(width, heads).double()
    for parameter in selector.parameters():
        torch.nn.init.normal_(parameter)
    selector.weigh2.bias.data += shift
    x = torch.randn(3, p, width, dtype=torch.float64).transpose(0, 1)
    policy = (torch.rand(3, p) < 0.6).double()
    policy[:, 0] = 1
    for given in (policy, None):
        logits = selector(x, given)
        assert logits.shape == (3, p, 2)
        every = torch.ones_like(policy) if given is None else given
        wanted = torch.stack([naive_logits(selector, x[:, b], every[b]) for b in range(3)])
        torch.testing.assert_close(logits.double(), wanted, rtol=1e-4, atol=1e-5)


def test_selector_without_a_seen_token_is_finite():
    logits = Selector(48, 3)(torch.randn(5, 2, 48), torch.zeros(2, 5))
    assert logits.isfinite().all()


@pytest.mark.parametrize("keep", [0.3, 0.9, 1.0])
def test_selector_starts_near_the_ratio(keep):
    torch.manual_seed(0)
    chance = Selector(48, 3, keep)(torch.randn(50, 4, 48)).softmax(-1)[..., 0].mean()
    assert abs(chance - min(keep, 0.99)) < 0.1


@pytest.mark.parametrize("depth, stages", [(12, (3, 6, 9)), (24, (6, 12, 18)), (20, (5, 10, 15))])
def test_counts_of_real_models(depth, stages):
    spec = replace(models.spec(models.create("deit_tiny_patch16_224")), depth=depth)
    plan = slimvit.SPViT().bind(spec)
    assert plan.acts_before == stages and not plan.chooses
    patches = [196, 137 + 1, 96 + 2, 67 + 3]
    wanted = [1 + n for n in patches for _ in range(depth // 4)]
    assert plan.alive == tuple(wanted)
    assert plan.counts == (*wanted[:-1], 1)


def test_macs_are_counted_by_hand():
    spec = models.spec(models.create("deit_tiny_patch16_224"))
    plan = slimvit.SPViT().bind(spec)
    d, c = 192, 64
    one = 3 * (c * c + c * c // 4 + c * c // 8 + c // 2) + 2 * 3 * 1 + d
    assert plan.macs(spec) == (196 + 137 + 96) * one + 3 * 3 * (c * c // 4)  # and the means
    blocks = 0
    for m in [197] * 3 + [139] * 3 + [99] * 3 + [71] * 2:
        blocks += 4 * m * d * d + 2 * m * m * d + 8 * m * d * d
    blocks += 2 * d * d + 2 * 71 * d * d + 2 * 71 * d + 8 * d * d
    ends = 196 * 768 * d + d * 1000
    assert gmacs(spec, plan) == pytest.approx((blocks + ends + plan.macs(spec)) / 1e9)


def test_macs_are_of_the_patches_that_an_image_kept():
    spec = models.spec(slim_dense("deit"))
    plan = slimvit.SPViT((0.5, 0.25), stages=(0, 1)).bind(spec)
    own = plan.with_counts((1 + 11 + 1, 1 + 4 + 2, 1))

    def work(patches: int) -> int:
        return Selector.macs(spec.width, spec.heads, patches) + patches * spec.width

    assert plan.macs(spec) == work(16) + work(8)
    assert own.macs(spec) == work(16) + work(11)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["deit_distilled", "dinov2_reg4", "oblong"])
def test_tokens_are_really_removed_and_kept_sets_are_nested(name, batch):
    slim = slimmed(name)
    plan, images = slim.plan, random_images(slim_dense(name), batch)
    kept = slim.kept_sets(images)
    assert [k.shape[1] for k in kept] == list(plan.counts)
    before = set(range(plan.tokens))
    for layer, places in enumerate(kept):
        if layer in plan.acts_before:
            before.add(plan.tokens + plan.acts_before.index(layer))
        for row in places.tolist():
            assert len(set(row)) == len(row) and set(row) <= before
            assert row == sorted(row) and row[0] == 0
    for b in range(batch):
        assert set(kept[1][b].tolist()) - {plan.tokens + 1} <= set(kept[0][b].tolist())
    assert slim.forward_features(images).shape == (batch, plan.tokens, plan.spec.width)


def slim_dense(name):
    return build(name).double()


@pytest.mark.parametrize(
    "keep, stages", [((0.7, 0.4), (0, 1)), ((0.99, 0.5), (0, 1)), ((0.3,), (1,))]
)
def test_inference_is_timms_blocks_on_what_is_left(keep, stages):
    slim = slimmed(keep=keep, stages=stages)
    dense, plan = slim_dense("deit"), slim.plan
    images = random_images(dense, 3)
    logits = []
    for image in images:
        x = dense.norm_pre(dense._pos_embed(dense.patch_embed(image[None])))
        patches, packages = list(range(16)), 0
        for layer, block in enumerate(dense.blocks):
            if layer in plan.acts_before:
                tokens = x[0, 1 : 1 + len(patches)]
                scores = naive_logits(plan.selectors[str(layer)], tokens, [1] * len(patches))
                chance = scores.softmax(-1)[:, 0]
                order = (scores[:, 0] - scores[:, 1]).argsort(descending=True, stable=True)
                n = round(keep[stages.index(layer)] * 16)
                kept, pruned = sorted(order[:n].tolist()), sorted(order[n:].tolist())
                package = sum(chance[i] * tokens[i] for i in pruned) / chance[pruned].sum()
                old = x[0, 1 + len(patches) :]
                x = torch.cat([x[0, :1], tokens[kept], old, package[None]])[None]
                patches, packages = kept, packages + 1
            x = block(x)
        logits.append(dense.forward_head(dense.norm(x)))
    assert off(slim(images), torch.cat(logits)) < 1e-5  # selectors decide in float32


def test_a_stage_that_prunes_nothing_is_left_out():
    spec = models.spec(slim_dense("deit"))
    plan = slimvit.SPViT((1.0, 0.5), stages=(0, 1)).bind(spec)
    assert plan.acts_before == (1,) and plan.counts == (17, 10, 1)
    near = slimvit.SPViT((0.5, 0.49), stages=(0, 1)).bind(spec)
    assert near.acts_before == (0,) and len(near.selectors) == 1


def test_argmax_keeps_what_is_favoured_of_one_image():
    slim = slimmed(argmax=True)
    images = random_images(slim_dense("deit"), 2)
    found = set()
    for image in images:
        x = models.embed(slim, image[None]).transpose(0, 1)
        logits = slim.plan.selectors["0"](x[1:])
        wanted = int((logits[0, :, 0] > logits[0, :, 1]).sum())
        kept = slim.kept_sets(image[None])[0]
        assert kept.shape[1] == 1 + min(max(wanted, 1), 15) + 1
        found.add(kept.shape[1])
        assert slim(image[None]).isfinite().all()
    assert torch.equal(slim(images), torch.cat([slim(image[None]) for image in images]))
    alive = slimvit.ops.Alive(x.expand(-1, 2, -1), torch.arange(17).expand(2, -1))
    with pytest.raises(PlanError, match="one image a call, got 2"):
        slim.plan.before(0, alive)


def test_file_keeps_weights_and_settings(tmp_path):
    slim = slimmed("deit_distilled", temperature=0.7)
    images = random_images(slim_dense("deit_distilled"), 2)
    path = tmp_path / "plan.safetensors"
    slim.plan.float().save(path)
    plan = slimvit.load_plan(path)
    assert plan.settings() == slim.plan.settings() and plan.counts == slim.plan.counts
    again = slimvit.apply_masks(slim_dense("deit_distilled"), plan).double()
    assert torch.equal(again(images), slim.double()(images))
    assert torch.equal(torch.cat(again.kept_sets(images), 1), torch.cat(slim.kept_sets(images), 1))


def test_stages_of_numpy_go_into_a_file(tmp_path):
    plan = slimvit.SPViT((0.7, 0.4), stages=np.array([0, 1]), argmax=np.True_)
    plan = plan.bind(models.spec(slim_dense("deit")))
    plan.save(tmp_path / "plan.safetensors")
    again = slimvit.load_plan(tmp_path / "plan.safetensors")
    assert again.stages == (0, 1) and again.argmax is True and again.counts == plan.counts


def test_weights_are_the_same_wherever_it_is_bound(monkeypatch):
    spec = models.spec(slim_dense("deit"))
    first = slimvit.SPViT(KEEP, stages=STAGES).bind(spec).state_dict()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", None)  # GPUs' generators are the caller's
    second = slimvit.SPViT(KEEP, stages=STAGES).bind(spec).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_its_weights_go_to_a_model_of_other_classes():
    model, slim = slim_dense("deit"), slimmed()
    model.reset_classifier(3)
    again = slimvit.apply_masks(model, slim.plan)
    assert again.plan.spec.num_classes == 3
    weights = slim.plan.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in again.plan.state_dict().items())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep": (0.5, 0.7)}, r"keep must fall from stage to stage, got \[0.5, 0.7\]"),
        ({"keep": (0.5, 0.5)}, r"keep must fall"),
        ({"keep": (1.2, 0.5)}, "each of keep must be .* at most 1, got 1.2"),
        ({"keep": (0.5, 0.0)}, "each of keep must be finite, above 0 .*, got 0.0"),
        ({"keep": (float("nan"),)}, "each of keep must be finite, .* got nan"),
        ({"keep": ()}, "keep must be ratios, one for each stage, got none"),
        ({"keep": 0.5}, "keep must be numbers in a list, got 0.5"),
        ({"keep": None}, "keep must be numbers in a list, got None"),
        ({"keep": "abc"}, "keep must be numbers in a list, got 'abc'"),
        ({"keep": ["a"]}, "each of keep must be a number, got 'a'"),
        ({"stages": 3}, "stages must be whole numbers .*, got 3"),
        ({"argmax": "no"}, "argmax must be True or False, got 'no'"),
        ({"stages": (3, 6)}, r"stages must be as many as keep, 3, got \[3, 6\]"),
        ({"stages": (3, 3, 6)}, r"stages must be rising block numbers from 0, got \[3, 3, 6\]"),
        ({"stages": (-1, 3, 6)}, r"rising block numbers from 0"),
        ({"stages": (0.0, 1.5, 3.0)}, "each of stages must be a whole number, got 0.0"),
        ({"temperature": 0.0}, "temperature must be finite and above 0, got 0.0"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(PlanError, match=message):
        slimvit.SPViT(**options)


def test_stages_must_lie_in_the_model():
    spec = models.spec(slim_dense("deit"))
    rule = r"stages must be different blocks from 0 to 1 of the 3 .*got \[1, 2\]"
    with pytest.raises(PlanError, match=rule):
        slimvit.SPViT(KEEP, stages=(1, 2)).bind(spec)
    with pytest.raises(PlanError, match=r"got \[0, 1, 2\]"):
        slimvit.SPViT().bind(spec)
