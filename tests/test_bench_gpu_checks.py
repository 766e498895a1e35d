"""Benchmarks on GPUs check what they time, and refuse it where it is wrong."""

import functools
import multiprocessing
import os
import pickle
import types

import pytest
import timm
import torch
from cuda_checks import use
from emulated import A100, V100
from gpu_bench import fated

from slimvit import Masks, accelerate
from slimvit.backends import cuda_kernels


@pytest.fixture(scope="module")
def launches(bench):
    """Launches of a wide block, whose second half is three kernels, and of a narrow one's."""
    calls, found = bench("gpu_calls"), {}
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    for width in (64, 112):
        torch.manual_seed(0)
        options = {"embed_dim": width, "depth": 2, "num_heads": width // 16, "num_classes": 5}
        model = timm.create_model("test_vit", img_size=32, **options).eval().to(device)
        bench("gpu_networks").randomised(model)
        masks = Masks.from_counts((4, 1), (2, 2))
        fast = accelerate(model, masks, backend="triton", precision="float32", batch_sizes=(2,))
        with torch.no_grad(), calls.watched(lambda launch: found.setdefault(launch.name, launch)):
            fast(torch.randn(2, 3, 32, 32, device=device))
    return found


@pytest.mark.triton
def test_every_kernel_of_the_floor_is_watched_and_matches_float64(bench, launches):
    last = {"last_q", "last_u", "last_attention", "last_v"}
    halves = {f"{p}{n}" for p in ("", "last_") for n in ("proj", "fc1", "fc2", "proj_mlp")}
    assert set(launches) == {"embedding", "qkv", "attention"} | last | halves
    for name, launch in launches.items():
        verdict = bench("gpu_calls").judge(launch)
        assert verdict.passes, (name, verdict)
        assert verdict.error > 0


@pytest.mark.triton
def test_the_table_is_asked_as_the_launches_ask_it(launches, configs, monkeypatch):
    asked = []

    def noted(stage, arch, itemsize, width, rows, lookup=configs.lookup):
        asked.append((stage, width, rows))
        return lookup(stage, arch, itemsize, width, rows)

    for launch in launches.values():
        monkeypatch.setitem(launch.function.__globals__, "lookup", noted)
        launch()
        assert asked.pop() == (launch.stage, *launch.table_key())


def wrong(launch, spoil):
    """The launch, its result spoilt."""

    @functools.wraps(launch.function)
    def function(**arguments):
        return spoil(launch.function(**arguments))

    return type(launch)(launch.name, launch.stage, function, launch.arguments)


@pytest.mark.triton
def test_wrong_kernels_are_refused(bench, launches):
    def one_value(result):
        result[0][-1, -1, -1] += 0.01
        return result

    def statistics(result):
        result[1][-1, 0, 0, 1] *= 1.1
        return result

    def unwritten(result):
        return torch.empty_like(result[0]), result[1]

    for spoil in (one_value, statistics, unwritten):
        assert not bench("gpu_calls").judge(wrong(launches["fc2"], spoil)).passes
    assert not bench("gpu_calls").judge(wrong(launches["attention"], torch.neg)).passes


def test_a_network_that_fails_is_refused_and_said(bench, monkeypatch):
    kernels, said = bench("gpu_kernels"), []
    network = kernels.Network("deit_tiny_patch16_224", 224, "1", "cpu")
    task = kernels.Task("triton", network, "float16", (1,))
    bad = bench("gpu_calls").Verdict(0.5, 0.001, 0.002)
    for check in (
        lambda task: [kernels.Check("triton", network, "float16", "slim", 1, "qkv", bad)],
        lambda task: (_ for _ in ()).throw(RuntimeError("out of registers")),
    ):
        monkeypatch.setattr(kernels, "check", check)
        assert kernels.check_all([task], 1, said.append)[1] == {("triton", network, "float16")}
    assert "qkv (slim, batch 1) is not timed: it is 0.5 off, PyTorch 0.001" in said[0]
    assert said[-1].endswith("RuntimeError: out of registers")


def test_processes_that_check_tell_why_they_could_not(bench):
    kernels, said = bench("gpu_kernels"), []
    networks = [kernels.Network("no_such_model", size, "1", "cpu") for size in (32, 64)]
    tasks = [kernels.Task("triton", network, "float32", (1,)) for network in networks]
    found, refused = kernels.check_all(tasks, 2, said.append)
    assert (found, refused) == ([], {task[:3] for task in tasks})
    assert all("not checked, so not timed: UsageError" in line for line in said)


def fates(bench, *names, device="cpu"):
    kernels = bench("gpu_kernels")
    networks = [kernels.Network(name, 32, "1", device) for name in names]
    return [kernels.Task("triton", network, "float32", (1,)) for network in networks]


def test_a_process_that_dies_takes_no_other_along(bench, monkeypatch):
    kernels, said = bench("gpu_kernels"), []
    monkeypatch.setattr(kernels, "answer", fated)
    tasks = fates(bench, "works", "dies", "works")
    found, refused = kernels.check_all(tasks, 2, said.append)
    assert [check.network for check in found] == [tasks[0].network, tasks[2].network]
    assert refused == {tasks[1][:3]}
    reason = "kernels not checked, so not timed: its process ended with -11"
    assert said[1] == f"dies 32 px float32: {reason}"
    assert len({check.kernel for check in found} | {f"by {os.getpid()}"}) == 3


def test_a_process_that_hangs_is_ended(bench, monkeypatch):
    kernels, said = bench("gpu_kernels"), []
    monkeypatch.setattr(kernels, "answer", fated)
    monkeypatch.setattr(kernels, "DEADLINE", 1.0)
    assert kernels.check_all(fates(bench, "hangs"), 2, said.append)[0] == []
    assert said[0].endswith("so not timed: it took more than 1 s")
    assert multiprocessing.active_children() == []


def test_a_gpu_is_never_used_by_the_process_that_measures(bench, monkeypatch):
    kernels = bench("gpu_kernels")
    monkeypatch.setattr(kernels, "answer", fated)
    here = f"by {os.getpid()}"
    for device in ("cpu", "cuda:1"):
        tasks = fates(bench, "works", device=device)
        (check,), _ = kernels.check_all(tasks, 1, lambda line: None)
        assert (check.kernel == here) == (device == "cpu")


@pytest.mark.triton
def test_launches_are_made_on_the_device_that_was_asked_for(bench, launches, monkeypatch):
    current = []

    def noted(device):
        current.append(str(device))
        raise RuntimeError("as far as this goes without a GPU")

    monkeypatch.setattr(torch.cuda, "set_device", noted)
    assert "as far as" in bench("gpu_kernels").answer(fates(bench, "a", device="cuda:1")[0])
    tune = bench("tune_compile")
    job = tune.job(launches["attention"], (16, 16, 16, 4, 1))
    assert job.device == str(launches["attention"].arguments["q"].device)
    assert "as far as" in tune.compile_one(job._replace(device="cuda:1"))
    assert current == ["cuda:1"] * 2


@pytest.mark.parametrize(
    ("lost_in", "rounds"),
    [(None, {"a": 3, "c": 3}), (0, {"a": 1}), (1, {"a": 1, "c": 1}), (2, {"a": 2, "c": 2})],
)
def test_rows_keep_the_rounds_before_another_fails(bench, monkeypatch, lost_in, rounds):
    models, said, calls = bench("gpu_models"), [], []

    def fails(images):
        calls.append(images)
        if len(calls) > 2 * (lost_in or 0):  # two calls a turn
            raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(models, "answers", lambda clock: lost_in is None)
    clock = bench("gpu_clock").Clock(torch.device("cpu"))
    work = types.SimpleNamespace(images=[torch.zeros(1)], batch=1, clock=clock)
    runs = {"a": torch.clone, "b": fails, "c": torch.clone}
    rows = [models.Row(name, "slim", False, run, 0.0, 0.0, None) for name, run in runs.items()]
    kept = models.timed(rows, work, said.append, 3, 0.0)
    assert {row.runtime: len(row.rates) for row in kept} == rounds
    assert all(len(row.rates) == len(row.latencies) for row in kept)
    error = "RuntimeError: CUDA error: an illegal memory access"
    lost = "the device does not answer any more"
    named = [("b", error)] + [(name, lost) for name in "ac" if name not in rounds]
    assert said == [f"  {name} slim is not timed: {why}" for name, why in named]


def test_no_row_is_made_ready_on_a_device_that_is_lost(bench, monkeypatch):
    models, said, tried = bench("gpu_models"), [], []

    def attempt(runtime, *_):
        tried.append(runtime)
        return ("row", None) if len(tried) == 1 else (None, "out of memory")

    def ready(lost):
        tried.clear()
        monkeypatch.setattr(models, "answers", lambda clock: not lost)
        monkeypatch.setattr(models, "attempt", attempt)
        work = types.SimpleNamespace(clock=None)
        wanted = {"torch": None, "torch.compile": None, "torch.compile:max-autotune": None}
        monkeypatch.setitem(models.ROWS, "rows", [(name, "dense") for name in wanted])
        return models.prepared("rows", work, wanted.get, said.append), len(tried)

    assert ready(lost=False) == (["row"], 3)
    assert ready(lost=True) == ([], 2)
    assert said[-1] == "  no other row is timed: the device does not answer any more"


def test_a_device_whose_error_stays_does_not_answer(bench, monkeypatch):
    clock = bench("gpu_clock").Clock(torch.device("cpu"))
    assert bench("gpu_models").answers(clock)
    monkeypatch.setattr(clock, "wait", lambda: torch.zeros(2)[5])
    assert not bench("gpu_models").answers(clock)


@pytest.mark.triton
def test_another_process_launches_the_same_on_zeros(bench, launches):
    compile_one, job = bench("tune_compile").compile_one, bench("tune_compile").job
    for name in ("proj_mlp", "attention"):
        work = pickle.loads(pickle.dumps(job(launches[name], (16, 16, 16, 4, 1))))
        assert compile_one(work) == ""
    broken = work._replace(arguments=work.arguments | {"heads": 0})
    assert "division" in compile_one(broken)


@pytest.mark.parametrize("device", [A100, V100], ids=str)
def test_a_whole_block_is_watched_where_it_is_one_launch(bench, emulated_cuda, monkeypatch, device):
    """On an A100; on a V100 the other kernels compute it."""
    calls, found, dtype = bench("gpu_calls"), {}, use(device)

    @functools.wraps(cuda_kernels.whole_block)
    def whatever_the_batch(*args, **kwargs):
        return cuda_kernels.fused_block(*args, **kwargs)

    monkeypatch.setattr(cuda_kernels, "whole_block", whatever_the_batch)
    torch.manual_seed(0)
    options = {"embed_dim": 192, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = timm.create_model("test_vit", img_size=32, **options).eval()
    bench("gpu_networks").randomised(model)
    precision = str(dtype).removeprefix("torch.")
    masks = Masks.from_counts((4, 1), (2, 2))
    fast = accelerate(model, masks, backend="cuda", precision=precision)
    x, index = torch.randn(2, 5, 192).to(dtype), torch.tensor([[2, 0, 4], [1, 3, 0]])
    with (
        torch.no_grad(),
        calls.watched(lambda launch: found.update({launch.key(): launch}), "cuda"),
    ):
        fast(torch.randn(2, 3, 32, 32))
        fast.fused.blocks[0](x, index)
    blocks = [launch for launch in found.values() if launch.name == "block"]
    assert len(blocks) == (2 if device == A100 else 0)
    assert ("qkv" in {launch.name for launch in found.values()}) == (device == V100)
    for launch in blocks:
        verdict = calls.judge(launch.copy())
        assert 0 < verdict.error <= verdict.limit
        assert not calls.judge(wrong(launch, lambda result: (-result[0], result[1]))).passes
        assert not calls.judge(wrong(launch, lambda result: (result[0], -result[1]))).passes


@pytest.mark.usefixtures("emulated_cuda")
def test_every_launch_of_cuda_is_checked_once(bench):
    """The product of an embedding is part of it, with a residual that all images share."""
    kernels, dtype = bench("gpu_kernels"), use(V100)
    network = kernels.Network("test_vit", 48, "71x5,1", "cpu")  # 101 tokens at its own 160 pixels
    precision = str(dtype).removeprefix("torch.")
    found = kernels.check(kernels.Task("cuda", network, precision, (3,)))
    slim = [check.kernel for check in found if check.form == "slim"]
    assert slim.count("embedding") == 1
    assert slim.count("last_u") == 1
    assert {"qkv", "attention", "proj", "last_q", "last_attention", "last_v"} <= set(slim)
    assert {check.batch for check in found if check.form == "index"} == {2, 3}
    assert all(check.verdict.passes for check in found), found
