"""Planners of one's own: which kernels and files know them, and what they may not do."""

import pytest
import torch
from planners import falling
from references import build, off, random_images

from slimvit import DPS, Absorb, Planner, SPViT, accelerate, apply_masks, load_plan
from slimvit.backends import why_not
from slimvit.dynamic import Choice
from slimvit.errors import PlanError, SlimvitError
from slimvit.models import spec
from slimvit.ops import Alive

COUNTS = [12, 6, 1]


def by_class(self, layer, view, n):
    return view.top(view.class_attention().mean(1), n)


def as_told(self, layer, received):
    return self.counts[layer]


def one_less(self, layer, received):
    return (12, 5, 1)[layer]


def other_scores(self, layer, view, n):
    importance, cosine, score = Absorb._scores(self, layer, view, n)
    return importance, cosine, torch.where(score == torch.inf, score, -score)


def warmer(self, layer, alive):
    return alive._replace(x=alive.x * 1.5)


def hidden(self, layer, view, n):
    choice = Absorb.choose(self, layer, view, n)
    return choice._replace(weight=None)


@pytest.mark.parametrize(
    ("parent", "changes"),
    [
        (DPS, {"choose": by_class}),
        (DPS, {"count": as_told}),
        (DPS, {"before": warmer}),
        (Absorb, {"choose": hidden}),
        (Absorb, {"count": as_told}),
        (Absorb, {"before": warmer}),
        (Absorb, {"_scores": other_scores}),
        (SPViT, {"count": as_told, "choose": by_class}),
    ],
    ids=lambda of: of.__name__ if isinstance(of, type) else "-".join(of),
)
def test_kernels_know_nothing_of_what_a_subclass_does(parent, changes):
    model = build("deit")
    own = type("Own", (parent,), {"kind": f"test-own-{parent.kind}", **changes})
    plan = own([0.6, 0.3], stages=[0, 1]) if parent is SPViT else own(counts=COUNTS)
    if why_not("cpu", "cpu", torch.float32) is None:
        with pytest.raises(SlimvitError, match=f"no kernels for the planner {own.kind}[;:] "):
            accelerate(model, plan, backend="cpu")
    fast, slim, images = accelerate(model, plan), apply_masks(model, plan), random_images(model, 3)
    assert fast.backend == "torch"
    with torch.no_grad():
        assert off(fast(images), slim(images)) < 1e-5
    assert [s.shape[1] for s in fast.kept_sets(images)] == [
        s.shape[1] for s in slim.kept_sets(images)
    ]


@pytest.mark.parametrize("kind", [Absorb, DPS])
def test_kernels_know_nothing_of_a_choose_that_a_plan_was_given(kind):
    model, plan = build("deit"), kind(counts=COUNTS)
    plan.choose = lambda layer, view, n: view.top(-view.alive.place.float(), n)
    fast = accelerate(model, plan)
    assert fast.backend == "torch"
    assert fast.kept_sets(random_images(model, 1))[1].tolist() == [[0, 1, 2, 3, 4, 5]]


class TestWhatIsToldIsDone:
    """MACs are counted by what a plan says that it keeps."""

    def refused(self, plan, message):
        model = build("deit")
        slim = apply_masks(model, plan)
        for run in (slim.eval(), accelerate(model, plan)):
            with pytest.raises(PlanError, match=message):
                run(random_images(model, 2))
        slim.train()(random_images(model, 2))

    @pytest.mark.parametrize("counts", [COUNTS, [17, 17, 17]])
    def test_a_count_of_its_own(self, counts):
        own = type("Fewer", (DPS,), {"kind": "test-fewer", "count": one_less, "choose": by_class})
        layer, told, got = (2, 6, 5) if counts == COUNTS else (1, 17, 12)
        of = 12 if counts == COUNTS else 17
        message = f"test-fewer: block {layer} must make {told} tokens of {of}.*got {got} of {of}"
        self.refused(own(counts), message)

    def test_a_count_left_to_the_choice(self):
        changes = {"count": lambda self, layer, got: None, "choose": self.all_but_one}
        own = type("Free", (Planner,), {"kind": "test-free", **changes})
        self.refused(own(COUNTS), "test-free: block 1 must make 12 tokens of 17.*got 16 of 17")

    @staticmethod
    def all_but_one(self, layer, view, n):
        return view.top(view.class_attention().mean(1), view.alive.x.shape[0] - 1)

    def test_tokens_removed_ahead(self):
        def before(self, layer, alive):
            return Alive(alive.x[:10], alive.place[:, :10]) if layer == 1 else alive

        own = type(
            "Ahead", (Planner,), {"kind": "test-ahead", "choose": by_class, "before": before}
        )
        message = "test-ahead: block 2 must make 6 tokens of 12.*got 6 of 10"
        self.refused(own(COUNTS), message)
        alive = property(lambda self: (17, 10, 6))
        right = type("Right", (own,), {"kind": "test-right", "alive": alive})
        model = build("deit")
        accelerate(model, right(COUNTS))(random_images(model, 2))


def test_kernels_choose_for_a_subclass_that_chooses_alike():
    if (reason := why_not("cpu", "cpu", torch.float32)) is not None:
        pytest.skip(reason)
    model, images = build("deit"), random_images(build("deit"), 2)

    class Named(Absorb):
        def extra_repr(self):
            return "mine"

    fast = accelerate(model, Named(counts=COUNTS), backend="cpu")
    assert torch.equal(
        fast(images), accelerate(model, Absorb(counts=COUNTS), backend="cpu")(images)
    )


@pytest.mark.parametrize("parent", [DPS, Absorb])
def test_a_subclass_without_a_kind_of_its_own_is_not_saved_as_its_parent(parent, tmp_path):
    class Own(parent):
        choose = by_class

    plan = Own(counts=COUNTS).bind(spec(build("deit")))
    rule = f"Own must have a kind of its own, .*: '{parent.kind}' is {parent.__name__}"
    with pytest.raises(PlanError, match=rule):
        plan.save(tmp_path / "p.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_of_a_class_that_was_defined_again_is_saved(tmp_path):
    """As a notebook's cell does that is run twice."""

    def define():
        class Cell(Planner):
            kind = "test-cell"
            choose = by_class

        return Cell

    first = define()
    second = define()
    first(COUNTS).save(tmp_path / "p.safetensors")
    assert type(load_plan(tmp_path / "p.safetensors")) is second is not first


def averaging(index, m, least):
    weight = torch.ones(2, m)
    weight[0, -1] = least
    return Choice(index, torch.zeros(2, m - index.shape[1], dtype=torch.int64), weight)


class Wrong(Planner):
    """Gives what it is told to."""

    kind = "test-wrong"

    def __init__(self, counts, choice):
        super().__init__(counts)
        self.choice = choice

    def choose(self, layer, view, n):
        index = view.top(view.alive.place, n).index
        return self.choice(index, view.alive.x.shape[0])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (lambda index, m: Choice(index.flip(1)), "choose must keep the 1 prefix tokens, got"),
        (lambda index, m: Choice(index.clamp(min=1)), "choose must keep the 1 prefix tokens, got"),
        (lambda index, m: Choice(index * 0), "choose must give places from 0 to m - 1"),
        (lambda index, m: Choice(index[0]), r"choose must give index \[B, n\] = \[2, 12\], got"),
        (lambda index, m: Choice(index.int()), r"index in int64, got \[2, 12\] int32"),
        (lambda index, m: Choice(index.tolist()), "choose must give index in int64, got list"),
        (lambda index, m: None, "choose must give a Choice, got NoneType"),
        (lambda index, m: index, r"choose must give a Choice, got \[2, 12\] int64"),
        (
            lambda index, m: Choice(index, index[:, : m - 12] * 0, torch.ones(2, 12)),
            r"choose must give weight \[B, m\] = \[2, 17\], got \[2, 12\] float32",
        ),
        (lambda index, m: Choice(index.where(index == 0, m)), "choose must give places from 0 to"),
        (
            lambda index, m: Choice(index, torch.full((2, m - index.shape[1]), index.shape[1])),
            "choose must give into, of each pruned token, from 0 to n - 1",
        ),
        (
            lambda index, m: Choice(index, torch.zeros(2, m - index.shape[1])),
            r"choose must give into in int64, got \[2, 5\] float32",
        ),
        (lambda index, m: averaging(index, m, 0.0), "choose must give weights above 0, got 0"),
        (lambda index, m: averaging(index, m, -1.5), "weights above 0, got -1.5"),
    ],
    ids=[
        *("unsorted", "prefix", "twice", "shape", "int32", "list", "none", "tensor", "weight"),
        *("outside", "into", "into-dtype", "no-weight", "negative-weight"),
    ],
)
def test_a_wrong_choice_is_refused(choice, message):
    model = build("deit")
    slim = apply_masks(model, Wrong([12, 6, 1], choice)).eval()
    with pytest.raises(PlanError, match=message):
        slim(random_images(model, 2))


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        (lambda x: x.norm(dim=-1), r"\[17, 2\] float32"),
        (lambda x: x.norm(dim=-1).t()[:, 1:], r"\[2, 16\] float32"),
        (lambda x: x.norm(dim=-1).t().tolist(), "list"),
        (lambda x: None, "NoneType"),
    ],
)
def test_wrong_scores_are_refused(scores, found):
    model = build("deit")

    def choose(self, layer, view, n):
        return view.top(scores(view.alive.x), n)

    scored = type("Scored", (Planner,), {"kind": "test-scored", "choose": choose})
    with pytest.raises(PlanError, match=rf"scores must be \[B, m\] = \[2, 17\], got {found}"):
        apply_masks(model, scored(falling(model)))(random_images(model, 2))


def test_a_planner_that_cannot_choose_says_so():
    model = build("deit")

    class Idle(Planner):
        kind = "test-idle"

    with pytest.raises(PlanError, match="Idle has no choose, and block 1 is to keep 12 of 17"):
        apply_masks(model, Idle([12, 6, 1]))(random_images(model, 1))


class NoModule(Planner):
    kind = "test-no-module"
    choose = by_class

    def __init__(self, counts=None):
        self.factor = 2


class OwnCounts(NoModule):
    kind = "test-own-counts"

    def __init__(self, counts=None):
        self.counts = tuple(COUNTS)


class NoCounts(NoModule):
    kind = "test-no-counts"

    def __init__(self, counts=None):
        torch.nn.Module.__init__(self)


@pytest.mark.parametrize("own", [NoModule, OwnCounts, NoCounts])
def test_a_planner_that_was_not_begun_says_so(own, tmp_path):
    rule = rf"^{own.__name__}\.__init__ must begin with super\(\)\.__init__\(counts\)$"
    for use in (apply_masks, accelerate):
        with pytest.raises(PlanError, match=rule):
            use(build("deit"), own(COUNTS))
    with pytest.raises(PlanError, match=rule):
        own(COUNTS).save(tmp_path / "p.safetensors")


@pytest.mark.parametrize("given", [None, torch.zeros(3)])
@pytest.mark.parametrize("use", [apply_masks, accelerate])
def test_what_before_gives_is_checked(use, given):
    model = build("deit")
    changes = {"kind": "test-before", "choose": by_class, "before": lambda *_: given}
    fast = use(model, type("Before", (Planner,), changes)(COUNTS))
    for call in (fast, fast.kept_sets):
        with pytest.raises(PlanError, match="before must give an Alive, got (NoneType|Tensor)$"):
            call(random_images(model, 2))
