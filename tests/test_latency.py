"""Latency tables: what they hold and predict, the shares that meet a target; the commands."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import slimvit
from slimvit import backends, bench, cli, models
from slimvit.bench import LatencyTable, _target, keep_for_latency, latency_table, plan_for_latency
from slimvit.bench._latency import Row
from slimvit.bench._pieces import pieces
from slimvit.bench._rounds import Measured
from slimvit.errors import PlanError, SlimvitError, UsageError

QUICK = {"rounds": 1, "seconds": 0.001, "threads": 1}


def made(shape, block=lambda n: 0.01 * n, rest=0.5):
    """A table whose blocks take `block(tokens)` ms, last blocks a tenth, selectors a fifth."""
    rows = []
    for keep in (1.0, 0.75, 0.5, 0.25, 0.1):
        n = shape.prefix + round(keep * shape.patches)
        rows.append(Row(keep, n, block(n), block(n) / 10, block(n) / 5))
    return LatencyTable(
        model=shape.name, image_size=shape.image_size, device="cpu", device_name="made up",
        threads=1, backend="cpu", precision="float32", batch=1, rounds=1, rows=tuple(rows),
        rest_ms=rest, dense_ms=99.0, versions={}, commit="",
    )  # fmt: skip


@pytest.fixture(scope="module")
def shape():
    return models.spec(models.create("deit_tiny_patch16_224"))


def test_prediction_is_the_sum_by_hand(shape):
    plan = slimvit.SPViT((0.7, 0.49, 0.343)).bind(shape)
    received = [197] * 3 + [139] * 3 + [99] * 3 + [71] * 3
    wanted = 0.5 + 0.01 * sum(received[:-1]) + 0.001 * 71
    wanted += 0.002 * ((1 + 196) + (1 + 137) + (1 + 96))
    assert made(shape).predict(plan) == pytest.approx(wanted)


def test_between_rows_it_is_linear_and_beyond_them_extended(shape):
    table = made(shape, block=lambda n: n * n)
    rows = table.rows
    for row in rows:
        assert table.at(row.tokens, "block_ms") == row.block_ms
    middle = (rows[1].tokens + rows[2].tokens) / 2
    assert table.at(middle, "block_ms") == pytest.approx((rows[1].block_ms + rows[2].block_ms) / 2)
    slope = (rows[0].block_ms - rows[1].block_ms) / (rows[0].tokens - rows[1].tokens)
    beyond = table.at(rows[0].tokens + 10, "block_ms")
    assert beyond == pytest.approx(rows[0].block_ms + 10 * slope)
    assert table.at(1, "block_ms") < rows[-1].block_ms


@pytest.mark.parametrize("target", [10.0, 13.3, 18.0, 21.0])
@pytest.mark.parametrize("stages", [None, (2, 5), (0, 4, 8, 10)])
def test_shares_meet_the_target_by_the_table(shape, target, stages):
    table = made(shape)
    plan = keep_for_latency(table, shape, target, stages)
    assert table.predict(plan) == pytest.approx(target, rel=0.01)
    shares = plan.keep
    assert all(b == pytest.approx(a * shares[0]) for a, b in zip(shares, shares[1:]))
    assert plan.stages == stages


@pytest.mark.parametrize("target", [0.4, 3.0, 40.0])
def test_a_target_out_of_reach_is_named(shape, target):
    rule = rf"target latency must lie between [\d.]+ and [\d.]+ ms.*got {target:.3g} ms"
    with pytest.raises(PlanError, match=rule):
        keep_for_latency(made(shape), shape, target)


def test_a_table_of_a_busy_machine_is_named(shape):
    with pytest.raises(PlanError, match="pruning makes deit_tiny.* no faster .*idle"):
        keep_for_latency(made(shape, block=lambda n: 5 - 0.01 * n), shape, 10.0)


def test_a_table_of_another_model_is_refused(shape):
    with pytest.raises(UsageError, match="the latency table is of other at .*deit_tiny"):
        keep_for_latency(replace(made(shape), model="other"), shape, 10.0)


def test_shares_are_corrected_by_what_they_took(shape, monkeypatch):
    table, asked = made(shape), []

    def slower(model, plan, table, *, seconds):
        asked.append(plan)
        ms = 1.2 * table.predict(plan) + 0.3
        return _target.Latency(2 * ms, 2 * table.dense_ms, ms)

    monkeypatch.setattr(_target, "measure_latency", slower)
    model = models.create("deit_tiny_patch16_224")
    plan, took = plan_for_latency(model, table, 15.0)
    assert took == pytest.approx(15.0, rel=0.03) and asked[-1] is plan
    assert 1 < len(asked) <= 3
    plan, took = plan_for_latency(model, table, 15.0, tries=1)
    assert took == pytest.approx(18.3, rel=0.01)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_measured_table(tiny_vit, backend, tmp_path):
    before = torch.get_num_threads()
    table = latency_table(tiny_vit, backend=backend, batch=2, ratios=(0.5, 1.0, 0.2), **QUICK)
    assert torch.get_num_threads() == before
    assert (table.backend, table.precision, table.batch) == (backend, "float32", 2)
    assert [row.tokens for row in table.rows] == [17, 9, 4]
    for row in table.rows:
        assert row.keep == (row.tokens - 1) / 16
        assert all(ms > 0 for ms in (row.block_ms, row.last_ms, row.selector_ms))
    assert table.dense_ms > 0 and math.isfinite(table.rest_ms)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table.to_json()))
    assert LatencyTable.load(path) == table
    took = _target.measure_latency(
        tiny_vit, slimvit.SPViT((0.5,), stages=(2,)), table, seconds=0.01
    )
    assert all(ms > 0 for ms in took)


def test_latency_is_told_at_the_pace_of_the_table(tiny_vit, monkeypatch):
    table = replace(made(models.spec(tiny_vit)), dense_ms=10.0, batch=4)
    # Rounds of an ever slower machine: the slimmed model takes half of what the dense one does.
    rates = [[[800.0, 400.0, 200.0], [400.0, 200.0, 100.0]]]
    monkeypatch.setattr(_target, "measure", lambda *_, **__: Measured(rates))
    took = _target.measure_latency(tiny_vit, slimvit.SPViT((0.5,), stages=(2,)), table)
    assert took == (10.0, 20.0, 5.0)


def test_blocks_are_timed_through_the_back_end(tiny_vit, monkeypatch):
    seen = []
    real = torch.ops.slimvit.slim_block

    def counted(x, pack, n, *rest):
        seen.append((x.shape[0], n))
        return real(x, pack, n, *rest)

    monkeypatch.setattr(torch.ops.slimvit, "slim_block", counted)
    latency_table(tiny_vit, backend="cpu", ratios=(1.0, 0.5), **QUICK)
    assert {(17, 17), (9, 9), (17, 1), (9, 1)} <= set(seen)


def test_blocks_are_timed_through_fused_kernels(tiny_vit, monkeypatch):
    if (reason := backends.why_not("triton", "cpu", torch.float32)) is not None:
        pytest.skip(reason)
    probe = slimvit.accelerate(tiny_vit, slimvit.SPViT((0.5,), stages=(0,)), backend="triton")
    seen = []
    real = torch.ops.slimvit.fused_block

    def counted(x, stats, weights, n, *rest):
        seen.append((*x.shape[:2], n))
        return real(x, stats, weights, n, *rest)

    monkeypatch.setattr(torch.ops.slimvit, "fused_block", counted)
    chain, last, selector = pieces(probe, 5, 2, models.spec(tiny_vit))
    chain(None)
    assert seen == [(2, 5, 5)] * 4
    last(None)
    assert seen[4:] == [(2, 5, 1)]
    assert selector(None).shape == (2, 5, 64)  # the class token, three of four patches, a package


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratios": (0.5,)}, r"ratios must be two or more in \(0, 1\], got \[0.5\]"),
        ({"ratios": (0.5, 1.5)}, r"in \(0, 1\], got \[1.5, 0.5\]"),
        ({"ratios": (0.02, 0.01)}, r"16 patches, got \[0.02, 0.01\], which give 2 alone"),
        ({"ratios": "ab"}, "ratios must be numbers in a list, got 'ab'"),
        ({"ratios": 0.5}, "ratios must be numbers in a list, got 0.5"),
        ({"ratios": (0.5, float("nan"))}, "each of ratios must be finite, got nan"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"backend": "tpu"}, "tpu"),
        ({"precision": "int8"}, "precision must be one of"),
    ],
)
def test_bad_arguments_are_named(tiny_vit, options, message):
    with pytest.raises(SlimvitError, match=message):
        latency_table(tiny_vit, **{**QUICK, **options})


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "slimvit-latency", "version": 2}', '{"format": "x"}']
)
def test_a_broken_file_is_one_line(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="table.json is not a readable latency table") as caught:
        LatencyTable.load(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="absent.json is not a readable"):
        LatencyTable.load(tmp_path / "absent.json")


@pytest.fixture
def call(tiny_vit, tmp_path, monkeypatch, capsys):
    """Run a command on the small model and 12 images, in an empty folder."""
    save_file(tiny_vit.state_dict(), tmp_path / "model.safetensors")
    noise = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "images" / f"c{i % 10}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    shared = ["--model", "test_vit", "--img-size", "64", "--num-classes", "10", "--device", "cpu"]
    shared += ["--checkpoint", str(tmp_path / "model.safetensors")]
    train = ["--data-dir", str(tmp_path / "images"), "-b", "6", "--amp", "none"]
    train += ["--output", "slim.safetensors"]

    def run(command, *flags):
        extra = train if command == "finetune" else []
        status = cli.main([command, *shared, *extra, *flags])
        return status, *capsys.readouterr()

    return run


def test_command_measures_a_table(call):
    flags = ["--rounds", "1", "--seconds", "0.001", "--keep-ratios", "1,0.5,0.2"]
    status, out, err = call("latency-table", *flags, "--json", "t.json")
    assert status == 0 and all("rest_ms" in line for line in err.splitlines()), err
    assert "patches kept" in out and "the whole model unpruned" in out
    table = LatencyTable.load("t.json")
    assert [row.tokens for row in table.rows] == [17, 9, 4] and table.batch == 1
    assert call("latency-table", "--keep-ratios", "2,0.5")[0] == 2


def test_finetune_trains_selectors_and_validate_reads_them(call, tmp_path):
    flags = ["--spvit", "0.7,0.4", "--stages", "1,3", "--epochs", "1", "--json", "f.json"]
    status, out, err = call("finetune", *flags)
    assert status == 0, err
    assert "kept 0." in out and "slim.safetensors and slim.plan.safetensors: give" in out
    values = json.loads(Path("f.json").read_text())
    assert values["plan"]["keep"] == [0.7, 0.4] and values["kept"] == [17, 13, 13, 9, 9, 1]
    assert values["settings"]["lr"] == pytest.approx(5e-4 * 6 / 512)
    flags = ["--masks", "slim.plan.safetensors", "--slim-checkpoint", "slim.safetensors"]
    flags += ["--data-dir", str(tmp_path / "images"), "--json", "v.json"]
    status, out, err = call("validate", *flags)
    assert status == 0, err
    assert json.loads(Path("v.json").read_text())["plan"] == "spvit"


@pytest.mark.parametrize("flags", [["--absorb", "0.3"], ["--spvit"]])
def test_finetune_takes_every_kind_of_plan(call, flags):
    status, out, err = call("finetune", *flags, "--epochs", "1")
    assert status == 0, err
    assert slimvit.load_plan("slim.plan.safetensors").kind == flags[0][2:]


def test_finetune_to_a_latency(call, tiny_vit):
    shape = models.spec(tiny_vit)
    table = made(shape)
    Path("t.json").write_text(json.dumps(table.to_json()))
    target = table.predict(slimvit.SPViT((0.6, 0.36, 0.216)).bind(shape))
    flags = ["--spvit", "--target-latency", str(target), "--latency-table", "t.json"]
    status, out, err = call("finetune", *flags, "--epochs", "1", "--json", "f.json")
    assert status == 0, err
    assert f"target {target:.3f} ms" in out
    latency = json.loads(Path("f.json").read_text())["latency"]
    assert latency["target_ms"] == pytest.approx(target) and latency["measured_ms"] > 0
    assert latency["table"]["rows"][0]["tokens"] == 17
    plan = slimvit.load_plan("slim.plan.safetensors")
    assert latency["predicted_ms"] == pytest.approx(table.predict(plan))


def test_a_stopped_run_goes_on_with_the_shares_that_it_began_with(call, tiny_vit, monkeypatch):
    from slimvit.cli import finetune as command

    shape, real, told = models.spec(tiny_vit), command._line, []
    table = made(shape)
    Path("t.json").write_text(json.dumps(table.to_json()))
    target = table.predict(slimvit.SPViT((0.6, 0.36, 0.216)).bind(shape))

    def stop(entry, epochs):
        if entry["epoch"] == 2:
            raise KeyboardInterrupt
        return real(entry, epochs)

    monkeypatch.setattr(command, "_line", stop)
    flags = ["--spvit", "--target-latency", str(target), "--latency-table", "t.json"]
    flags += ["--epochs", "2"]
    assert call("finetune", *flags)[0] == 130
    begun = slimvit.load_plan("slim.plan.safetensors").keep
    monkeypatch.setattr(command, "_line", real)
    monkeypatch.setattr(bench, "plan_for_latency", lambda *_, **__: told.append("chosen anew"))
    status, _, err = call("finetune", *flags)
    assert status == 0, err
    assert told == [] and slimvit.load_plan("slim.plan.safetensors").keep == begun


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--spvit", "0.5,0.7"], "keep must fall from stage to stage, got [0.5, 0.7]"),
        (["--spvit", "--stages", "1,2"], "--spvit, --stages: stages must be as many as keep, 3"),
        (["--spvit", "1.5"], "shares in (0, 1]"),
        (["--spvit", "--stages", "3,6,9"], "from 0 to 4 of the 6"),
        (["--spvit", "--stages", "x"], "blocks counted from 0"),
        (["--spvit", "0.5", "--target-latency", "3"], "give --spvit without any"),
        (["--absorb", "0.3", "--stages", "1"], "--stages needs --spvit"),
        (["--absorb", "0.3", "--target-latency", "1"], "--target-latency needs --spvit"),
        (["--spvit", "--latency-table", "t"], "--latency-table needs --target-latency"),
        (["--spvit", "--target-latency", "0"], "> 0"),
        (["--spvit", "--target-latency", "1", "--latency-table", "no.json"], "no.json is not"),
        (["--spvit", "--absorb", "0.3"], "not allowed with"),
    ],
)
def test_wrong_flags_are_one_line(call, flags, words):
    status, out, err = call("finetune", *flags)
    assert status == (1 if "of the 6" in words else 2)  # of the model, or of themselves
    assert out == ""
    assert err.count("\n") == 1 and words in err, err
    assert os.listdir() == []
