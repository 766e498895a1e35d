"""Benchmarks on GPUs check what they time, and refuse it where it is wrong."""

import functools
import pickle

import pytest
import timm
import torch

from slimvit import Masks, accelerate


@pytest.fixture(scope="module")
def launches(bench):
    """Launches of a wide block, whose second half is three kernels, and of a narrow one's."""
    calls, found = bench("gpu_calls"), {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
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


def test_every_kernel_of_the_floor_is_watched_and_matches_float64(bench, launches):
    last = {"last_q", "last_u", "last_attention", "last_v"}
    halves = {f"{p}{n}" for p in ("", "last_") for n in ("proj", "fc1", "fc2", "proj_mlp")}
    assert set(launches) == {"embedding", "qkv", "attention"} | last | halves
    for name, launch in launches.items():
        verdict = bench("gpu_calls").judge(launch)
        assert verdict.passes, (name, verdict)
        assert verdict.error > 0


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


def test_another_process_launches_the_same_on_zeros(bench, launches):
    compile_one, job = bench("tune_compile").compile_one, bench("tune_compile").job
    for name in ("proj_mlp", "attention"):
        work = pickle.loads(pickle.dumps(job(launches[name], (16, 16, 16, 4, 1))))
        assert compile_one(work) == ""
    broken = work._replace(arguments=work.arguments | {"heads": 0})
    assert "division" in compile_one(broken)
