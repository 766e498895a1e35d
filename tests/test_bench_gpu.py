"""Benchmarks on GPUs: what they plan, write and tell."""

import csv
import importlib
import json
import re
import sys

import pytest
import timm
import torch
from gpu_bench import BENCHMARKS, MODELS, ROOT, interpreted, on_gpu

from slimvit import Masks
from slimvit.backends import why_not
from slimvit.bench import parse_keep
from slimvit.errors import UsageError

FACTS = {"device": "GPU", "commit": "abc", "source": "123", "torch": "2"}


def planned(bench, **options):
    asked = {"batches": (1, 64, 256, 1024), "precisions": ("float16", "bfloat16")}
    return bench("gpu_plan").plan(MODELS, (224, 384), **(asked | options))


def test_what_matters_most_is_measured_first(bench):
    steps = planned(bench)
    first = [(s.kind, s.batch, s.precision) for s in steps[:12]]
    tiers = [("rows", 256), ("graphs", 1), ("kernels", 256), ("rows", 1)]
    assert first == [(kind, batch, "float16") for kind, batch in tiers for _ in MODELS]
    assert [s.model for s in steps[:3]] == list(MODELS)
    assert len(set(steps)) == len(steps)
    rows = {s[1:] for s in steps if s.kind == "rows"}
    asked = {(m, 224, b, p) for m in MODELS for b in (1, 64, 256, 1024)
             for p in ("float16", "bfloat16")}  # fmt: skip
    assert rows == asked | {(m, 384, b, "float16") for m in MODELS for b in (1, 64)}
    assert {s.kind for s in steps[-3:]} == {"max-autotune"}


def test_without_batch_256_the_largest_comes_first(bench):
    steps = planned(bench, batches=(2, 8), precisions=("float32",), kinds=("rows",))
    assert [s.batch for s in steps if s.image_size == 224] == [8] * 3 + [2] * 3


def test_a_budget_learns_how_long_steps_take(bench):
    plan = bench("gpu_plan")
    budget, steps = plan.Budget(100), planned(bench)
    rows = [step for step in steps if step.kind == "rows"]
    assert budget.allows(rows[0], 100 - plan.EXPECTED["rows"])
    budget.spent(rows[0], 50)
    assert budget.expected(rows[1]) == 50
    budget.spent(rows[1], 70)
    assert (budget.expected(rows[0]), budget.expected(rows[2])) == (50, 60)
    assert not budget.allows(rows[1], 31)
    assert budget.expected(steps[3]) == plan.EXPECTED["graphs"]


def stored(step, kept, **changed):
    where = {"model": step.model, "image_size": str(step.image_size), "batch": str(step.batch)}
    where |= {"precision": step.precision, "kept": kept}
    kind = {} if step.kind == "kernels" else {"step": step.kind}
    return {**FACTS, **where, **kind, **changed}


@pytest.mark.parametrize("kind", ["rows", "kernels"])
def test_a_step_is_done_only_for_this_very_code_and_device(bench, kind):
    plan = bench("gpu_plan")
    step = plan.Step(kind, MODELS[0], 224, 256, "float16")
    rows = [stored(step, "197x12"), stored(step, "141,1")]
    assert plan.done(step, rows, FACTS, ["197x12", "141,1"])
    assert not plan.done(step, rows[:1], FACTS, ["197x12", "141,1"])
    assert not plan.done(step._replace(batch=64), rows, FACTS, ["197x12", "141,1"])
    for name in FACTS:
        assert not plan.done(step, rows, FACTS | {name: "other"}, ["197x12", "141,1"])


def test_rows_measured_anew_take_the_place_of_the_old(bench):
    plan = bench("gpu_plan")
    step = plan.Step("rows", MODELS[0], 224, 256, "float16")
    other = step._replace(kind="max-autotune")
    old = [stored(step, "9"), stored(step, "8"), stored(other, "9"), stored(step, "9", device="B")]
    new = [stored(step, "9", commit="def")]
    assert plan.replaced(step, old, new, "GPU") == [*old[1:], *new]


def row(bench, runtime, form, rates, latencies=(1.0, 1.0, 1.0)):
    made = bench("gpu_models").Row(runtime, form, False, None, 1e-3, 1e-3, None)
    made.rates, made.latencies = list(rates), list(latencies)
    return made


def records(bench, kind, batch, rows, model=MODELS[0]):
    step = bench("gpu_plan").Step(kind, model, 224, batch, "float16")
    shape = importlib.import_module("slimvit.models").spec(timm.create_model(model))
    masks = {"dense": Masks.dense(12, (14, 14))}
    masks["slim"] = Masks.from_counts(parse_keep("141,141,131,121,111x7,1"), (14, 14))
    return bench("gpu_tables").speed_records(step, rows, shape, masks, dict(FACTS))


def test_ratios_are_medians_of_the_rounds_ratios(bench):
    rows = [
        row(bench, "torch", "dense", (50, 50, 50)),
        row(bench, "torch.compile", "dense", (100, 200, 100)),
        row(bench, "slimvit:triton", "dense", (100, 300, 100), (4.0, 2.0, 2.0)),
        row(bench, "slimvit:triton", "slim", (170, 510, 400), (2.0, 1.0, 2.0)),
    ]
    found = records(bench, "rows", 256, rows)
    slim = found[-1]
    assert slim["over_dense"] == "1.7000"
    assert slim["over_compile"] == "2.5500"
    assert float(slim["of_ideal"]) == pytest.approx(1.7 * (1 - float(slim["cut"])), abs=1e-3)
    assert (slim["latency_over_dense"], slim["latency_over_torch"]) == ("0.5000", "2.0000")
    assert (slim["median"], slim["min"], slim["max"]) == ("400.00", "170.00", "510.00")
    assert found[0]["over_dense"] == found[0]["over_compile"] == found[2]["over_dense"] == ""
    assert found[0]["cut"] == "0.0000"
    assert found[2]["kept"] == "197x12"
    assert set(found[0]) <= set(bench("gpu_tables").SPEED)


def test_acceptance_takes_the_fastest_mode_of_torch_compile(bench):
    tables, dense, slim = bench("gpu_tables"), (100.0,), (230.0,)

    def ours(graphs=1.0):
        fast = row(bench, "slimvit:triton", "slim", slim, (graphs * 0.5,))
        return [row(bench, "slimvit:triton", "dense", (120.0,), (1.0,)), fast]

    found = records(
        bench, "rows", 256, [row(bench, "torch.compile", "dense", dense, (1,)), *ours()]
    )
    assert "slim / default torch.compile dense | 2.300 | ≥ 2.2 | met" in tables.acceptance(found)
    slow = [row(bench, "torch.compile:max-autotune", "dense", (110.0,), (1,)), *ours()]
    found += records(bench, "max-autotune", 256, slow)
    found += records(bench, "graphs", 1, [row(bench, "torch", "dense", dense, (0.6,)), *ours()])
    text = tables.acceptance(found)
    assert "slim / best torch.compile dense | 2.091 | ≥ 2.2 | MISSED" in text
    assert "latency in graphs, slim / own dense | 0.500 | ≤ 0.6 | met" in text
    assert "latency in graphs, slim / torch dense | 0.833 | ≤ 0.6 | MISSED" in text
    only = records(bench, "rows", 1024, [row(bench, "slimvit:triton", "slim", slim, (1,))])
    assert tables.acceptance(only).count("not measured") == 2
    assert "| 100 |  | 120 | 230 | 1.92 | 2.30 |" in tables.speed_table(found[:3])


def test_csvs_are_read_back_and_others_are_left_alone(bench, tmp_path):
    tables, path = bench("gpu_tables"), tmp_path / "new" / "gpu-kernels.csv"
    kernel = {"device": "NVIDIA H200", "model": MODELS[0], "image_size": "224", "batch": "256"}
    kernel |= {"precision": "float16", "kernel": "qkv", "microseconds": "99.5", "kept": "197x12"}
    tables.write(path, tables.KERNELS, [kernel])
    (read,) = tables.read(path, tables.KERNELS)
    assert read == dict.fromkeys(tables.KERNELS, "") | kernel
    asked = {**kernel, "chip": "H200", "bytes_per_value": "2"}
    assert bench("gpu_roofline").found([read], asked) == 99.5
    with pytest.raises(UsageError, match="other columns"):
        tables.read(path, tables.SPEED)
    assert tables.read(tmp_path / "none.csv", tables.SPEED) == []


def test_nvidia_smi_is_read_for_this_device_only(bench):
    of_device = bench("gpu_clock").of_device
    lines = "GPU-aa, 1980, 3201\nGPU-bb, 345, 1593\n"
    assert of_device(lines, "bb", 2) == ["345", "1593"]
    assert of_device("GPU-aa, 580.1\n", "other", 1) == ["580.1"]
    assert of_device("command failed", "aa", 2) == ["", ""]


def test_the_digest_of_sources_tells_tables_apart(bench, tmp_path):
    seen, files = set(), ("kernels/configs.json", "kernels/a.py", "slimvit/b.py", "csrc/cuda/c.cu")
    for file in files:
        for text in "12":
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            seen.add(bench("gpu_clock").source(tmp_path))
    assert len(seen) == 2 * len(files)


def test_logits_beyond_twice_pytorchs_error_are_refused(bench):
    refusal = bench("gpu_models").refusal
    assert refusal(0.0019, 0.001, "float16") is None
    assert "off float32" in refusal(0.004, 0.001, "float16")
    assert "off float32" in refusal(float("nan"), 0.001, "float16")
    assert "eager PyTorch itself" in refusal(0.001, 0.5, "bfloat16")


def test_a_lost_device_ends_a_step_and_not_the_run(bench, monkeypatch, tmp_path, capsys):
    """Its good rows are written, and a new process takes the steps after it."""
    gpu, models, tried = bench("gpu"), bench("gpu_models"), []
    arguments = ["--device", "cpu", "--models", "test_vit", "--keep", "60,40x4,1", "--kinds"]
    arguments += ["rows", "--image-sizes", "32", "--precisions", "float32", "--batches", "4", "2"]
    arguments += ["1", "--minutes", "5", "--output", str(tmp_path)]
    fails = {4: RuntimeError("CUDA error: an illegal memory access"), 2: None, 1: None}

    def measure(step, network, *_):
        tried.append(step.batch)
        if fails[step.batch] is not None:
            raise fails[step.batch]
        return [row(bench, "torch", "dense", (50.0,), (1.0,))], *network.shapes()

    def no_clocks(*_):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(gpu.Session, "check", lambda self, steps: None)
    monkeypatch.setattr(gpu.Session, "elapsed", lambda self: 60.0)
    monkeypatch.setattr(gpu, "clocks", no_clocks)
    monkeypatch.setattr(models, "measure", measure)
    monkeypatch.setattr(models, "answers", lambda clock: tried[-1] == 2)  # lost before
    monkeypatch.setattr(gpu.os, "set_inheritable", lambda *_: None)
    monkeypatch.setattr(gpu.os, "execv", lambda *given: sys.exit(given))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "gpu.py", *arguments])
    for batch, left in ((4, "4.00"), (1, "3.00")):
        with pytest.raises(SystemExit) as stop:
            gpu.main(sys.orig_argv[3:])
        path, command = stop.value.code
        step = f"rows: test_vit, 32 px, batch {batch}, float32"
        given_up = ["--without", step, "--minutes", left]
        assert (path, command) == (sys.executable, [path, *sys.orig_argv[1:], *given_up])
        monkeypatch.setattr(sys, "orig_argv", command)
    assert gpu.main(sys.orig_argv[3:]) == 0
    assert tried == [4, 1, 2]
    out = capsys.readouterr().out
    assert out.count("given up, the device was lost in it: rows: test_vit, 32 px, batch 4") == 2
    assert "Acceptance" in out.rpartition("given up")[2]
    with (tmp_path / "gpu-speed.csv").open(newline="") as file:
        assert [(r["batch"], r["sm_mhz"]) for r in csv.DictReader(file)] == [("1", ""), ("2", "")]
    monkeypatch.setattr(gpu.Session, "check", None)  # where no step fits, nothing is checked
    assert gpu.main([*sys.orig_argv[3:], "--minutes", "0"]) == 0
    assert "skipped, 30 s do not fit any more" in capsys.readouterr().out


REGISTER = """
import os, runpy
{environment}
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
@register_model
def vit_for_benchmarks(pretrained=False, img_size=32, pretrained_cfg=None, **_):
    return VisionTransformer(img_size, 16, embed_dim=64, depth=2, num_heads=1, num_classes=5)
sys.path.insert(0, {benchmarks!r})
def script(name, *arguments):
    sys.argv = [name, "--models", "vit_for_benchmarks", "--keep", "3,1", *arguments]
    try:
        runpy.run_path(os.path.join({benchmarks!r}, name), run_name="__main__")
    except SystemExit as stop:
        print("status", stop.code)
"""


SMALL = '"--batches", "1", "--precisions", "float32", "--rounds", "2", "--seconds", "0.01"'


@interpreted
@pytest.mark.triton
def test_dry_runs_on_a_cpu(run_from, tmp_path, configs):
    """From a checkout that is not installed: measure, go on where it was, tune a copy."""
    environment = "os.environ['TRITON_INTERPRET'] = '1'"
    runtimes = '"torch", "slimvit:torch", "slimvit:triton"'
    gpu = f'"gpu.py", "--device", "cpu", "--image-sizes", "32", {SMALL}, "--runtimes", {runtimes}'
    gpu += f', "--kinds", "rows", "kernels", "--output", {str(tmp_path)!r}'
    (tmp_path / "t.json").write_text(configs.TABLE.read_text())
    tune = '"tune.py", "--device", "cpu", "--image-size", "32", "--batches", "1"'
    tune += ', "--precision", "float32", "--stages", "mlp", "--most", "3"'
    out = run_from(
        ROOT,
        REGISTER.format(environment=environment, benchmarks=str(BENCHMARKS))
        + f"script({gpu})\nscript({gpu})\nscript({tune})\n"
        + f"script({tune}, '--table', {str(tmp_path / 't.json')!r})\n",
    )
    text = "\n".join(out)
    assert [line for line in out if line.startswith("status")] == [
        *["status 0"] * 2,
        "status 2",
        "status 0",
    ]
    assert "2 steps, 2 of them measured before" in text
    assert "not timed" not in text and "failed" not in text
    with (tmp_path / "gpu-speed.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["runtime"], r["form"]) for r in rows] == [
        ("torch", "dense"),
        ("slimvit:torch", "dense"),
        ("slimvit:torch", "slim"),
        ("slimvit:triton", "dense"),
        ("slimvit:triton", "slim"),
    ]
    assert all(r["source"] and r["device"] and float(r["median"]) > 0 for r in rows)
    with (tmp_path / "gpu-kernels.csv").open(newline="") as file:
        kernels = {(r["form"], r["kernel"]): r for r in csv.DictReader(file)}
    assert kernels["dense", "qkv"]["launches"] == "2"
    assert float(kernels["slim", "last_attention"]["floor_microseconds"]) > 0
    assert float(kernels["slim", "proj_mlp"]["error"]) > 0
    assert "mlp, sm_100, 4 bytes, width <= 64, any rows: 3 of 3 work" in text
    entries = json.loads((tmp_path / "t.json").read_text())
    assert [entry for entry in entries if entry in configs.entries()] == configs.entries()


@on_gpu
def test_a_small_model_on_a_gpu(run_from, tmp_path):
    """All kinds of steps, torch.compile and CUDA graphs included."""
    # A model of timm's own: the processes that check kernels do not know the one made here.
    gpu = '"gpu.py", "--models", "test_vit", "--keep", "60,40x4,1", "--image-sizes", "32", '
    gpu += SMALL.replace("float32", "float16").replace('"1"', '"1", "2"')
    code = REGISTER.format(environment="", benchmarks=str(BENCHMARKS))
    code += f'script({gpu}, "--output", {str(tmp_path)!r})\n'
    out = "\n".join(run_from(ROOT, code))
    assert "status 0" in out
    assert not re.search("failed|not checked|off, PyTorch", out)
    with (tmp_path / "gpu-speed.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = {(r["step"], r["runtime"]) for r in rows}
    assert ("graphs", "slimvit:triton") in steps
    if why_not("cuda", "cuda", torch.float16) is None:
        assert {r["batch"] for r in rows if r["runtime"] == "slimvit:cuda"} == {"1", "2"}
    assert {r["runtime"] for r in rows} >= {"torch.compile", "torch.compile:max-autotune"}
    assert all(float(r["median"]) > 0 and r["driver"] and r["sm_mhz"] for r in rows)
