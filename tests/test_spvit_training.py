"""SPViT's training mode: decisions, packages and gradients."""

import math

import pytest
import torch
from references import off, random_images
from test_spvit import slim_dense, slimmed

import slimvit
from slimvit import models
from slimvit.ops.slim_attention import masked_attention, slim_attention


def pick_top(logits, previous, stage):
    """The decisions of inference, in training."""
    score = (logits[..., 0] - logits[..., 1]).masked_fill(previous == 0, -math.inf)
    return torch.zeros_like(score).scatter(1, score.topk(stage.patches, 1).indices, 1.0)


@pytest.mark.parametrize("name", ["deit", "deit_distilled", "dinov2_reg4", "qk_norm"])
def test_training_is_inference_where_the_decisions_are(name, monkeypatch):
    slim = slimmed(name)
    images = random_images(slim_dense(name), 3)
    wanted, kept = slim(images), slim.kept_sets(images)
    monkeypatch.setattr(slim.plan, "decide", pick_top)
    logits, left = slim.train().trace(images)
    assert off(logits, wanted) < 1e-5
    first = slim.plan.prefix
    for alive, places in zip(left[:-1], kept):
        policy = alive.policy[:, first : slim.plan.tokens]
        for b in range(3):
            seen = policy[b].nonzero()[:, 0] + first
            assert set(seen.tolist()) == {
                p for p in places[b].tolist() if first <= p < slim.plan.tokens
            }
        mine = alive.x.transpose(0, 1)[alive.policy.bool()].view(3, places.shape[1], -1)
        assert mine.isfinite().all()


def test_package_is_the_weighted_mean_and_weights_sum_to_one(monkeypatch):
    slim = slimmed()
    plan, images = slim.plan, random_images(slim_dense("deit"), 2)
    place = torch.arange(17).expand(2, -1)
    x = models.embed(slim, images).transpose(0, 1)
    alive = plan.before(0, slimvit.dynamic.Alive(x, place))
    logits = plan.selectors["0"](x[1:])
    for b in range(2):
        pruned = sorted(set(range(1, 17)) - set(alive.place[b].tolist()))
        chance = logits[b].softmax(-1)[:, 0]
        weights = chance[[i - 1 for i in pruned]] / chance[[i - 1 for i in pruned]].sum()
        torch.testing.assert_close(
            alive.x[-1, b], weights.double() @ x[pruned, b], rtol=1e-5, atol=1e-6
        )
    assert (alive.place[:, -1] == 17).all()
    # Of equal tokens the package is that token, in both modes.
    same = slimvit.dynamic.Alive(torch.ones_like(x), place)
    torch.testing.assert_close(plan.before(0, same).x[-1], torch.ones_like(x[0]))
    monkeypatch.setattr(plan, "decide", pick_top)
    torch.testing.assert_close(plan.train().before(0, same).x[-1], torch.ones_like(x[0]))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_training_survives_all_or_nothing(monkeypatch, value):
    slim = slimmed().train()
    monkeypatch.setattr(
        slim.plan, "decide", lambda logits, *_: torch.full_like(logits[..., 0], value)
    )
    images = random_images(slim_dense("deit"), 2)
    logits, left = slim.trace(images)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in slim.parameters())
    packages = left[1].policy[:, 17:].tolist()
    assert packages == [[1.0 - value, 0.0]] * 2
    if value == 1.0:  # nothing pruned: the dense model
        assert off(logits, slim_dense("deit")(images)) < 1e-6


def test_gradients_reach_every_weight():
    slim = slimmed(keep=(0.6, 0.3)).train()
    torch.manual_seed(0)
    logits, left = slim.trace(random_images(slim_dense("deit"), 4))
    (logits.square().sum() + left[1].policy.mean()).backward()
    flat = [n for n, p in slim.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert flat == []


def test_decisions_are_hard_and_repeat_under_a_seed():
    slim = slimmed().train()
    images = random_images(slim_dense("deit"), 3)

    def decisions(seed):
        torch.manual_seed(seed)
        return [alive.policy for alive in slim.trace(images)[1][:2]]

    first, again, other = decisions(1), decisions(1), decisions(2)
    for a, b in zip(first, again):
        assert torch.equal(a, b) and set(a.unique().tolist()) <= {0.0, 1.0}
    assert not torch.equal(first[0], other[0])
    assert (first[1][:, :17] <= first[0][:, :17]).all()


def test_checkpointed_training_is_the_same():
    slim = slimmed().train()
    images = random_images(slim_dense("deit"), 2)
    grads = []
    for checkpointed in (False, True):
        slim.set_grad_checkpointing(checkpointed)
        slim.zero_grad()
        torch.manual_seed(5)
        logits, left = slim.trace(images)
        (logits.square().sum() + left[1].policy.sum()).backward()
        grads.append([p.grad.clone() for p in slim.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_masked_attention_leaves_hidden_keys_out_but_tells_what_they_would_do():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 9, 9))
    bias = torch.randn(2, 9).double()
    policy = torch.ones(2, 9, dtype=torch.float64)
    policy[:, [1, 4]] = 0
    seen = policy[0].bool()
    for given in (None, bias):
        got = masked_attention(q, k, v, policy, given)
        part = None if given is None else given[:, seen]
        wanted = slim_attention(q, k[:, :, seen], v[:, :, seen], part)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    k[:, :, 1] *= 1000  # what is hidden may be anything
    assert masked_attention(q, k, v, policy).isfinite().all()
    policy.requires_grad_()
    masked_attention(q, k / 1000, v, policy).square().sum().backward()
    assert (policy.grad[:, [1, 4]] != 0).all()
