"""Plan files: what is written is read back, and what is wrong is refused in one line."""

import errno
import json
import os

import pytest
import torch
from references import build, random_images, random_masks
from safetensors import safe_open
from safetensors.torch import save_file

from slimvit import Absorb, Masks, Planner, apply_masks, load_plan
from slimvit.dynamic import DPS, SPViT, Static
from slimvit.errors import MasksError, PlanError
from slimvit.models import spec

COUNTS = [12, 6, 1]


def all_plans(model) -> dict[str, Planner]:
    masks = random_masks(model)
    return {
        "absorb": Absorb(counts=COUNTS),
        "absorb-cut": Absorb(cut=0.1),
        "dps": DPS(COUNTS),
        "dps-hidden": DPS(COUNTS, hidden=5),
        "spvit": SPViT([0.6, 0.3], stages=[0, 1]),
        "static": Static(masks),
    }


KINDS = ["absorb", "absorb-cut", "dps", "dps-hidden", "spvit", "static"]


def bound(kind: str) -> Planner:
    model = build("deit")
    plan = all_plans(model)[kind].bind(spec(model))
    with torch.no_grad():
        for parameter in plan.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return plan


def content(path) -> tuple[dict, dict]:
    """The tensors and the metadata of a file, which may then be written anew."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata()


def test_static_plans_are_read_by_their_older_kind(tmp_path):
    plan, path = bound("static"), tmp_path / "p.safetensors"
    plan.save(path)
    tensors, metadata = content(path)
    assert metadata["kind"] == "static-plan"
    save_file(tensors, path, metadata | {"kind": "static"})
    again = load_plan(path)
    assert type(again) is Static and torch.equal(again.keep, plan.keep)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_read_back(kind, tmp_path):
    plan, path = bound(kind), tmp_path / "p.safetensors"
    plan.save(path)
    again = load_plan(path)
    assert type(again) is type(plan)
    assert again.counts == plan.counts
    assert again.spec == plan.spec
    assert again.settings() == plan.settings()
    assert not again.training
    state = plan.state_dict()
    assert list(again.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    model = build("deit")
    images = random_images(model, 2)
    with torch.no_grad():
        assert torch.equal(apply_masks(model, path)(images), apply_masks(model, plan)(images))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_plan_is_the_same_bytes(kind, tmp_path):
    plan, path, found = bound(kind), tmp_path / "p.safetensors", set()
    for _ in range(9):
        plan.save(path)
        found.add(path.read_bytes())
    assert len(found) == 1


@pytest.mark.parametrize("kind", ["absorb", "absorb-cut", "dps", "spvit"])
def test_a_plan_of_no_model_yet(kind, tmp_path):
    plan = all_plans(build("deit"))[kind]
    plan.save(tmp_path / "p.safetensors")
    again = load_plan(tmp_path / "p.safetensors")
    assert again.spec is None
    assert again.settings() == plan.settings()
    for name in ("deit", "deit_distilled"):
        if plan.counts is None or kind == "spvit":
            shape = spec(build(name))
            assert again.bind(shape).counts == plan.bind(shape).counts


def test_counts_stay_when_the_schedule_changes(tmp_path, monkeypatch):
    plan = bound("absorb-cut")
    plan.save(tmp_path / "p.safetensors")
    monkeypatch.setattr(Absorb, "counts_for", lambda self, spec: self.counts or (17, 9, 1))
    assert load_plan(tmp_path / "p.safetensors").counts == plan.counts != (17, 9, 1)


def test_weights_of_half_precision_come_back_as_float32(tmp_path):
    plan = bound("dps").bfloat16()
    plan.save(tmp_path / "p.safetensors")
    again = load_plan(tmp_path / "p.safetensors")
    for key, value in plan.state_dict().items():
        assert again.state_dict()[key].dtype == torch.float32
        assert torch.equal(again.state_dict()[key], value.float())


def test_masks_are_read_too(tmp_path):
    masks = random_masks(build("deit"), "zero")
    masks.save(tmp_path / "m.safetensors")
    again = load_plan(str(tmp_path / "m.safetensors"))
    assert isinstance(again, Masks)
    assert torch.equal(again.keep, masks.keep)


def test_of_another_model(tmp_path):
    bound("dps").save(tmp_path / "p.safetensors")
    with pytest.raises(PlanError, match="the plan is of .*17 tokens.* got .*21 tokens"):
        apply_masks(build("dinov2_reg4"), tmp_path / "p.safetensors")


def test_missing(tmp_path):
    with pytest.raises(PlanError, match="masks or plan file not found"):
        load_plan(tmp_path / "none.safetensors")
    with pytest.raises(PlanError, match="masks or plan file is a folder"):
        load_plan(tmp_path)


def refused(path, *words) -> None:
    """Loading the file fails in one line that names it and says these words."""
    with pytest.raises(PlanError) as caught:
        load_plan(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in (path.name, *words):
        assert word in message, message


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_truncated(tmp_path, share):
    path = tmp_path / "p.safetensors"
    bound("dps").save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path, "not a readable safetensors file")


@pytest.mark.parametrize("text", [b"", b"PK\x03\x04 a zip", b"\x80\x02}q\x00.", b"{}" * 100])
def test_no_safetensors(tmp_path, text):
    path = tmp_path / "p.pth"
    path.write_bytes(text)
    refused(path, "not a readable safetensors file")


def test_safetensors_of_something_else(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(build("deit").state_dict(), path)
    refused(path, "neither a masks file nor a plan file", "'slimvit-masks'", "'slimvit-plan'")


def test_broken_masks(tmp_path):
    path = tmp_path / "m.safetensors"
    random_masks(build("deit")).save(path)
    tensors, metadata = content(path)
    save_file(tensors, path, metadata | {"prefix": "9"})
    with pytest.raises(MasksError, match=r"m\.safetensors"):
        load_plan(path)


CHANGES = [
    ({"version": "2"}, ["version '2'", "reads version 1"]),
    ({"version": None}, ["version None"]),
    ({"kind": "oracle"}, ["the planner 'oracle' is unknown", "absorb", "dps", "spvit", "static"]),
    ({"kind": None}, ["the planner '' is unknown"]),
    ({"kind": "static"}, ["unreadable metadata"]),
    ({"settings": None}, ["lacks the metadata 'settings'"]),
    ({"settings": "{"}, ["unreadable metadata"]),
    ({"settings": "[1]"}, ["unreadable metadata"]),
    ({"settings": "7"}, ["unreadable metadata"]),
    ({"settings": '{"magic": 1}'}, ["unreadable metadata", "magic"]),
    ({"settings": '{"counts": 3}'}, ["counts must be whole numbers in a list, got 3"]),
    ({"settings": '{"counts": [12, 6, 1], "hidden": 0}'}, ["hidden must be at least 1, got 0"]),
    ({"counts": None}, ["lacks the metadata 'counts'"]),
    ({"counts": "[12, 6"}, ["unreadable metadata"]),
    ({"counts": "5"}, ["unreadable metadata"]),
    ({"counts": "[12, 6]"}, ["one for each of 3 blocks, got 2"]),
    ({"counts": "[6, 12, 1]"}, ["not grow with depth"]),
    ({"counts": "[12.5, 6, 1]"}, ["each of counts must be a whole number, got 12.5"]),
    ({"counts": '["a", "b", "c"]'}, ["each of counts must be a whole number, got 'a'"]),
    ({"counts": "[Infinity, 6, 1]"}, ["each of counts must be a whole number, got inf"]),
    ({"spec": "{}"}, ["unreadable metadata"]),
    ({"spec": "null"}, ["unreadable metadata"]),
    ({"spec": "["}, ["unreadable metadata"]),
]


@pytest.mark.parametrize(("changes", "words"), CHANGES)
def test_wrong_metadata(tmp_path, changes, words):
    path = tmp_path / "p.safetensors"
    bound("dps").save(path)
    tensors, metadata = content(path)
    metadata = {k: v for k, v in (metadata | changes).items() if v is not None}
    save_file(tensors, path, metadata)
    refused(path, *words)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("depth", "three", "spec's depth must be int, got 'three'"),
        ("depth", 4, "one for each of 4 blocks, got 3"),
        ("grid", [4], "spec's grid must be tuple[int, int]"),
        ("grid", 4, "spec's grid must be tuple[int, int]"),
        ("width", -1, "spec's width must be int, got -1"),
        ("width", 10**30, "unreadable metadata"),
        ("prefix", None, "spec's prefix must be int, got None"),
        ("tokens", 5, "tokens"),
    ],
)
def test_wrong_shape_of_the_model(tmp_path, name, value, words):
    path = tmp_path / "p.safetensors"
    bound("dps").save(path)
    tensors, metadata = content(path)
    shape = json.loads(metadata["spec"]) | {name: value}
    save_file(tensors, path, metadata | {"spec": json.dumps(shape)})
    refused(path, words)


def test_wrong_weights(tmp_path):
    path = tmp_path / "p.safetensors"
    bound("dps").save(path)
    tensors, metadata = content(path)
    name = "predictors.1.down.weight"
    cases = {
        "Missing key": {k: v for k, v in tensors.items() if k != name},
        "Unexpected key": tensors | {"predictors.9.down.weight": torch.ones(2)},
        "size mismatch": tensors | {name: torch.ones(2, 3)},
        f"{name} must be torch.float32, got torch.int64": tensors
        | {name: torch.ones_like(tensors[name], dtype=torch.int64)},
        f"{name} must be finite": tensors | {name: tensors[name] / 0},
    }
    for words, changed in cases.items():
        save_file(changed, path, metadata)
        refused(path, words)


def test_static_masks_that_break_a_rule(tmp_path):
    path = tmp_path / "p.safetensors"
    bound("static").save(path)
    tensors, metadata = content(path)
    keep = tensors["keep"]
    grows = keep.clone()
    grows[2] = True
    no_class_token = keep.clone()
    no_class_token[:, 0] = False
    fewer = torch.ones_like(keep)
    cases = {
        "float": ("keep must be torch.bool", keep.float()),
        "nesting": ("p.safetensors", grows),
        "prefix": ("p.safetensors", no_class_token),
        "counts": ("it keeps [17, 17, 17], but names", fewer),
        "shape": ("size mismatch", keep[:2]),
    }
    for words, changed in cases.values():
        save_file({"keep": changed.contiguous()}, path, metadata)
        refused(path, words)


@pytest.mark.parametrize("existing", [None, b"old"])
def test_is_written_whole_or_not_at_all(tmp_path, monkeypatch, existing):
    path = tmp_path / "p.safetensors"
    if existing is not None:
        path.write_bytes(existing)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        bound("dps").save(path)
    monkeypatch.undo()
    assert (path.read_bytes() if path.exists() else None) == existing
    assert len(os.listdir(tmp_path)) == (existing is not None)


def test_the_file_holds_no_code(tmp_path):
    """Strings and tensors only: a plan from a stranger runs nothing."""
    path = tmp_path / "p.safetensors"
    bound("spvit").save(path)
    tensors, metadata = content(path)
    assert metadata["format"] == "slimvit-plan"
    assert metadata["kind"] == "spvit"
    assert json.loads(metadata["settings"])["keep"] == [0.6, 0.3]
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_that_has_run_is_saved(tmp_path, kind):
    model = build("deit")
    slim = apply_masks(model, bound(kind))
    slim(random_images(model, 2))
    slim.plan.save(tmp_path / "p.safetensors")


def test_counts_may_be_of_any_whole_numbers():
    assert DPS(torch.tensor(COUNTS)).bind(spec(build("deit"))).counts == tuple(COUNTS)
    with pytest.raises(PlanError, match="each of counts must be a whole number, got 12.5"):
        DPS([12.5, 6, 1]).bind(spec(build("deit")))
