"""Commands with dynamic plans: --absorb, plan files, and what they refuse."""

import dataclasses
import json
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from references import randomise
from safetensors.torch import save_file

from slimvit import Absorb, Masks, load_plan
from slimvit.cli import common, main
from slimvit.cli.finetune import _settings
from slimvit.dynamic import DPS, SPViT
from slimvit.finetune import Settings
from slimvit.macs import cut, gmacs
from slimvit.models import create, spec

COUNTS = (17, 12, 9, 7, 5, 1)
MODEL = ["--model", "test_vit", "--img-size", "64", "--num-classes", "10"]


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A checkpoint, plans, masks and 12 images of no class; read only."""
    folder = tmp_path_factory.mktemp("room")
    model = randomise(create("test_vit", img_size=64, num_classes=10))
    save_file(model.state_dict(), folder / "model.safetensors")
    shape = spec(model)
    plans = {"absorb": Absorb(counts=COUNTS), "dps": DPS(COUNTS), "spvit": SPViT([0.6, 0.3])}
    for name, plan in plans.items():
        plan.bind(shape).save(folder / f"{name}.safetensors")
    DPS(COUNTS).save(folder / "unbound.safetensors")
    Masks.from_counts(COUNTS, shape.grid, shape.prefix).save(folder / "masks.safetensors")
    other = spec(create("test_vit", img_size=80, num_classes=10))
    Absorb(cut=0.2).bind(other).save(folder / "other.safetensors")
    noise = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(12):
        pixels = noise.integers(0, 255, (8, 9, 3), np.uint8)
        picture = Image.fromarray(pixels).resize((90, 80), Image.Resampling.BICUBIC)
        picture.save(folder / "images" / f"{i}.png")
    return folder


@pytest.fixture
def call(room, tmp_path, monkeypatch, capsys):
    """Run a command on the room; (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(command, *arguments):
        given = [command, *MODEL, "--checkpoint", str(room / "model.safetensors")]
        if command == "validate":
            given += ["--data-dir", str(room / "images"), "--device", "cpu", "-b", "5"]
        status = main([*given, *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def refused(result, status, *words):
    """The call ended with `status`, one line on stderr with these words, and no file."""
    code, stdout, stderr = result
    lines = [line for line in stderr.splitlines() if not line.startswith("warning: ")]
    assert (code, stdout, len(lines)) == (status, "", 1), stderr
    for word in words:
        assert str(word) in lines[0], lines[0]
    assert os.listdir() == []


def read(name: str) -> dict:
    return json.loads(Path(name).read_text())


class TestValidate:
    @pytest.mark.parametrize("kind", ["absorb", "dps", "spvit"])
    def test_a_plan_file(self, room, call, kind):
        status, stdout, _ = call(
            "validate", "--masks", room / f"{kind}.safetensors", "--json", "v.json"
        )
        assert status == 0
        values = read("v.json")
        plan = load_plan(room / f"{kind}.safetensors")
        assert values["plan"] == kind
        assert values["semantics"] == "drop"
        assert values["kept"] == list(plan.counts)
        assert values["gmacs"] == gmacs(plan.spec, plan)
        assert values["cut"] == cut(plan.spec, plan)
        assert values["images"] == 12
        assert 0 <= values["agreement"] <= 100
        assert f"fewer MACs by {kind}" in stdout

    def test_thresholds_save_what_the_images_let_them(self, room, call, tmp_path):
        path, plan = tmp_path / "plan.safetensors", load_plan(room / "absorb.safetensors")
        ragged = Absorb(counts=plan.counts, thresholds=[0.01] * len(plan.counts)).bind(plan.spec)
        ragged.save(path)
        found = []
        for backend in ("cpu", "torch"):
            arguments = ("--masks", path, "--backend", backend, "--json", "v.json")
            assert call("validate", *arguments)[0] == 0
            found.append(read("v.json"))
            assert found[-1]["kept"] == list(plan.counts) and found[-1]["paper_gmacs"] is None
        for key in ("gmacs", "cut", "agreement", "divergence"):
            assert found[0][key] == pytest.approx(found[1][key], rel=1e-3, abs=1e-5)
        assert abs(found[0]["cut"] - cut(plan.spec, plan)) > 0.01

    def test_absorb_needs_no_file(self, room, call):
        arguments = ("--absorb", "0.35", "--backend", "torch", "--json", "v.json")
        assert call("validate", *arguments)[0] == 0
        values = read("v.json")
        assert values["plan"] == "absorb"
        assert 0.35 <= values["cut"] < 0.4
        assert values["kept"] == list(Absorb(0.35).bind(load_spec(room)).counts)
        assert values["backend"] == "torch"

    def test_masks_have_the_same_keys(self, room, call):
        assert call("validate", "--masks", room / "masks.safetensors", "--json", "m.json")[0] == 0
        assert call("validate", "--absorb", "0.3", "--json", "a.json")[0] == 0
        masks, absorb = (read(name) for name in ("m.json", "a.json"))
        assert list(masks) == list(absorb)
        assert masks["plan"] == "static"

    def test_weights_that_were_tuned_with_the_plan(self, room, call, tmp_path):
        plan, weights = tmp_path / "tuned.plan.safetensors", tmp_path / "tuned.safetensors"
        plan.write_bytes((room / "absorb.safetensors").read_bytes())
        weights.write_bytes((room / "model.safetensors").read_bytes())
        status, _, stderr = call("validate", "--masks", plan)
        assert status == 0
        assert f"tuned weights: {weights}" in stderr
        status, _, stderr = call("validate", "--masks", plan, "--slim-checkpoint", weights)
        assert status == 0
        assert "tuned weights" not in stderr

    def test_refusals(self, room, call):
        other = room / "other.safetensors"
        refused(call("validate", "--masks", other), 1, "the plan is of test_vit", "26 tokens")
        refused(
            call("validate", "--masks", room / "model.safetensors"),
            *(1, "neither a masks file nor a plan file"),
        )
        refused(call("validate", "--masks", "none"), 1, "masks or plan file not found: none")
        refused(call("validate"), 2, "--masks --absorb is required")
        refused(
            call("validate", "--absorb", "0.3", "--masks", room / "dps.safetensors"),
            *(2, "not allowed with argument"),
        )
        refused(call("validate", "--absorb", "0.97"), 1, "cut must be at most 0.")

    @pytest.mark.parametrize("command", ["validate", "bench", "show", "export"])
    @pytest.mark.parametrize("value", ["0", "1", "-0.5", "nan", "half"])
    def test_cuts_out_of_range(self, call, command, value):
        refused(call(command, "--absorb", value), 2, "> 0 and < 1", repr(value))


def load_spec(room):
    return load_plan(room / "absorb.safetensors").spec


class TestShow:
    def test_saves_a_plan(self, room, call):
        status, stdout, _ = call("show", "--absorb", "0.3", "--save", "p.safetensors")
        assert status == 0
        assert "wrote p.safetensors" in stdout
        plan = load_plan("p.safetensors")
        assert plan.spec == load_spec(room)
        assert plan.counts == Absorb(0.3).bind(plan.spec).counts
        assert main(["show", "--masks", "p.safetensors"]) == 0  # it names its model

    def test_tells_counts(self, room, capsys):
        assert main(["show", "--masks", str(room / "dps.safetensors")]) == 0
        out = capsys.readouterr().out
        assert "test_vit: 4 x 4 patches and 1 prefix token, chosen for each image: dps" in out
        rows = [line.split() for line in out.splitlines()[4:]]
        assert [int(row[1]) for row in rows] == list(COUNTS)

    @pytest.mark.parametrize("kind", ["absorb", "dps", "spvit"])
    def test_draws_an_image(self, room, call, kind):
        status, stdout, stderr = call(
            *("show", "--masks", room / f"{kind}.safetensors"),
            *("--image", room / "images" / "0.png", "--output", "k.png", "--pyramid", "p.svg"),
        )
        assert (status, stderr) == (0, "")
        assert "wrote k.png\nwrote p.svg" in stdout
        assert min(np.asarray(Image.open("k.png")).shape[:2]) > 200

    def test_refusals(self, room, call, capsys):
        image = str(room / "images" / "0.png")
        refused(call("show", "--absorb", "0.3", "--output", "k.png"), 2, "--output needs --image")
        refused(
            call("show", "--masks", room / "masks.safetensors", "--save", "p.safetensors"),
            *(2, "--save writes dynamic plans"),
        )
        refused(call("show", "--masks", room / "other.safetensors"), 1, "the plan is of test_vit")
        refused(call("show", "--absorb", "0.3", "--save", "no/p"), 2, "no does not exist")
        for given in (["--absorb", "0.3"], ["--masks", str(room / "unbound.safetensors")]):
            status = main(["show", *given])
            refused((status, *capsys.readouterr()), 2, "a plan of no model yet needs --model")
        bound = ["--masks", str(room / "dps.safetensors"), "--image", image, "--output", "k.png"]
        status = main(["show", *bound])
        refused((status, *capsys.readouterr()), 2, "--image needs --model")


class TestBench:
    QUICK = ("-b", "2", "--rounds", "1", "--seconds", "0.001", "--threads", "1")

    def test_a_plan_beside_static_masks(self, room, call):
        status, stdout, _ = call(
            *("bench", *self.QUICK, "--masks", room / "dps.safetensors", "--backend", "torch"),
            *("--against", "torch", "--json", "b.json", "--csv", "b.csv"),
        )
        assert status == 0
        assert "fewer MACs by dps" in stdout
        assert "dps / static masks of the same counts" in stdout
        assert "dps keeps what float32 keeps in 100.0 % of the places" in stdout
        values = read("b.json")
        assert [(row["runtime"], row.get("plan")) for row in values["rows"]] == [
            ("slimvit:torch", None),
            ("slimvit:torch", "dps"),
            ("slimvit:torch static", "static"),
            ("torch", None),
        ]
        assert values["ratios"]["plan_over_static"] > 0
        assert values["rows"][1]["kept_agreement"] == 1.0

    def test_absorb(self, call):
        status, stdout, _ = call(
            "bench", *self.QUICK, "--absorb", "0.3", "--against", "none", "--precision", "bfloat16"
        )
        assert status == 0
        assert "by absorb" in stdout

    def test_thresholds_are_timed_on_images_of_ones_own(self, room, call, tmp_path):
        plan = load_plan(room / "absorb.safetensors")
        path = tmp_path / "plan.safetensors"
        Absorb(counts=plan.counts, thresholds=[0.01] * 6).bind(plan.spec).save(path)
        given = ("bench", *self.QUICK, "--masks", path, "--against", "none", "--backend", "torch")
        status, _, stderr = call(*given)
        assert status == 0 and "random images are no measure of yours: give --data-dir" in stderr
        assert "random weights" not in stderr

    def test_thresholds_are_timed_with_weights_of_ones_own(self, room, tmp_path, capsys):
        path = tmp_path / "plan.safetensors"
        Absorb(counts=COUNTS, thresholds=[0.01] * 6).save(path)
        given = ["bench", *MODEL, *self.QUICK, "--masks", path, "--against", "none", "-b", "5"]
        assert main([*map(str, given), "--data-dir", str(room / "images")]) == 0
        stderr = capsys.readouterr().err
        assert "random weights are no measure of yours: give --checkpoint or --pret" in stderr
        assert "random images" not in stderr

    def test_refusals(self, room, call):
        refused(call("bench", "--keep", "9x6", "--absorb", "0.3"), 2, "not allowed with")
        other = room / "other.safetensors"
        refused(call("bench", "--masks", other), 1, "the plan is of test_vit")


def test_export(call):
    status, stdout, stderr = call("export", "--absorb", "0.3", "--output", "slim.pt2")
    assert (status, stderr) == (0, "")
    assert "answers like PyTorch at batch 1 and 3" in stdout
    program = torch.export.load("slim.pt2").module()
    assert program(torch.zeros(4, 3, 64, 64)).shape == (4, 10)


def test_a_plan_where_masks_are_wanted(room, call):
    plan = room / "absorb.safetensors"
    given = ("--data-dir", room / "images", "--device", "cpu", "--dynamic", "--output", "p")
    refused(call("prune", *given, "--masks", plan), 1, f"{plan} must be a masks file, got a dynam")


def test_the_kind_of_what_is_kept(room):
    assert common.plan_kind(load_plan(room / "masks.safetensors")) == "static"
    assert common.plan_kind(load_plan(room / "spvit.safetensors")) == "spvit"


def test_the_rate_of_spvit_is_for_the_images_of_all_processes():
    given = dict.fromkeys(field.name for field in dataclasses.fields(Settings))
    args = Namespace(**given, batch_size=8)
    assert _settings(args, SPViT(), world=4)["lr"] == pytest.approx(5e-4 * 32 / 512)
