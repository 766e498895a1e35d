"""The benchmark's structure and its refusals; no figure of speed is asserted anywhere."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from slimvit import bench as benchmarks
from slimvit.bench import (
    CSV_COLUMNS,
    RUNTIMES,
    Report,
    Row,
    Runtime,
    _machine,
    _rounds,
    append_csv,
    bench,
    format_keep,
    parse_keep,
)
from slimvit.bench._report import paired_ratio
from slimvit.cli import main
from slimvit.errors import MismatchError, SlimvitError, UsageError
from slimvit.macs import cut
from slimvit.masks import Masks
from slimvit.models import spec

COUNTS = (12, 5, 1)
QUICK = {"rounds": 2, "seconds": 0.002, "threads": 1, "batch": 2}


@pytest.fixture
def vit(tiny_vit):
    """Three blocks of it: exporters take their time block by block."""
    tiny_vit.blocks = tiny_vit.blocks[:3]
    return tiny_vit


@pytest.fixture
def masks():
    return Masks.from_counts(COUNTS, (4, 4))


class Other(Runtime):
    """A runtime of the tests: timm's answers, times `scale`."""

    name = "other"
    prunes = True
    scale = 1.0

    def prepare(self, work, pruned):
        self._net = work.network(pruned)

    def __call__(self, images):
        return self._net(images) * self.scale


@pytest.mark.parametrize(
    "text, counts",
    [
        ("141,141,131,121,111x7,1", (141, 141, 131, 121) + (111,) * 7 + (1,)),
        ("5x3", (5, 5, 5)),
        (" 4 , 2x1 ", (4, 2)),
        ("7", (7,)),
    ],
)
def test_kept_counts_are_read(text, counts):
    assert parse_keep(text) == counts
    assert parse_keep(format_keep(counts)) == counts


@pytest.mark.parametrize(
    "text", ["", "1,,2", "a", "3x", "x3", "-1", "1.5", "3x0", "0x0", "3x" + "9" * 21]
)
def test_kept_counts_are_refused(text):
    with pytest.raises(UsageError, match="kept counts look like"):
        parse_keep(text)


def test_kept_counts_are_written_short():
    assert format_keep((141, 141, 131, 121, *[111] * 7, 1)) == "141,141,131,121,111x7,1"


def test_every_runtime_has_its_rows(vit, masks):
    wanted = [("slimvit:torch", False), ("slimvit:torch", True), ("torch", False)]
    against = ["torch"]
    for name in ("onnxruntime", "openvino"):
        if importlib.util.find_spec(name):
            against.append(name)
            wanted += [(name, False), (name, True)]
    lines = []
    report = bench(
        vit,
        masks,
        backend="torch",
        precision="bfloat16",
        against=against,
        tell=lines.append,
        **QUICK,
    )
    assert [(row.runtime, row.pruned) for row in report.rows] == wanted
    assert len(lines) == len(wanted)
    for row in report.rows:
        assert len(row.rates) == 2
        assert min(row.rates) > 0
        assert row.precision == ("float32" if row.runtime == "onnxruntime" else "bfloat16") or (
            row.runtime == "openvino"  # float32 on processors without bfloat16
        )
    assert report.cut == pytest.approx(cut(spec(vit), masks))


def test_torch_compile_has_a_row(vit, masks):
    reason = RUNTIMES["torch.compile"].why_not(
        benchmarks.Setting(torch.device("cpu"), 2, "float32", 1)
    )
    if reason:
        pytest.skip(reason)
    report = bench(vit, masks, against=["torch.compile"], **QUICK)
    assert report.find("torch.compile", pruned=False).error < 1e-4


def test_the_model_and_the_threads_are_left_alone(vit, masks):
    vit.train()
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    threads = torch.get_num_threads()
    bench(vit, masks, against=[], **{**QUICK, "threads": threads + 1})
    assert torch.get_num_threads() == threads
    assert vit.training
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())


@pytest.mark.parametrize("precision, scale", [("float32", 1.01), ("bfloat16", 1.1)])
def test_a_runtime_that_answers_wrong_is_not_timed(vit, masks, monkeypatch, precision, scale):
    monkeypatch.setitem(RUNTIMES, "other", Other)
    monkeypatch.setattr(Other, "scale", scale)
    monkeypatch.setattr(_rounds, "_round", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(MismatchError, match=rf"other \(dense, {precision}\) is not timed.* off"):
        bench(vit, masks, against=["other"], precision=precision, **QUICK)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_dense_answer_does_not_pass_for_the_pruned_one(vit, masks, monkeypatch, precision):
    monkeypatch.setitem(RUNTIMES, "other", Other)
    monkeypatch.setattr(Other, "prepare", lambda self, work, _: setattr(self, "_net", work.model))
    with pytest.raises(MismatchError, match=r"other \(pruned"):
        bench(vit, masks, against=["other"], precision=precision, **QUICK)


def test_nan_does_not_match(vit, masks, monkeypatch):
    monkeypatch.setitem(RUNTIMES, "other", Other)
    monkeypatch.setattr(Other, "scale", float("nan"))
    with pytest.raises(MismatchError, match="inf off"):
        bench(vit, masks, against=["other"], **QUICK)


def test_a_runtime_that_does_not_work_is_left_out_with_the_reason(vit, masks, monkeypatch):
    monkeypatch.setattr(benchmarks._run, "RUNTIMES", {"other": Other})
    monkeypatch.setattr(Other, "why_not", classmethod(lambda cls, setting: "not here"))
    report = bench(vit, masks, **QUICK)
    assert report.left_out == {"other": "not here"}
    assert [row.runtime for row in report.rows] == ["slimvit:cpu"] * 2
    with pytest.raises(SlimvitError, match="runtime other: not here"):
        bench(vit, masks, against=["other"], **QUICK)


def test_a_runtime_that_fails_is_left_out_with_the_reason(vit, masks, monkeypatch):
    def fail(self, work, pruned):
        raise RuntimeError("no such instruction\nat line 3")

    monkeypatch.setattr(benchmarks._run, "RUNTIMES", {"other": Other})
    monkeypatch.setattr(Other, "prepare", fail)
    assert bench(vit, masks, **QUICK).left_out == {"other": "no such instruction"}
    with pytest.raises(SlimvitError, match="runtime other: no such instruction"):
        bench(vit, masks, against=["other"], **QUICK)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"seconds": float("nan")}, "seconds must be positive and finite, got nan"),
        ({"precision": "int8"}, "precision must be one of"),
        ({"against": ["tensorrt"]}, "unknown runtime 'tensorrt'"),
    ],
)
def test_bad_arguments_are_refused(vit, masks, options, message):
    with pytest.raises(UsageError, match=message):
        bench(vit, masks, **{**QUICK, "against": [], **options})


def report(rows, cut=0.5, batch=8):
    return Report(
        model="test_vit",
        device="cpu",
        device_name="a processor",
        threads=1,
        batch=batch,
        precision="float32",
        kept=COUNTS,
        cut=cut,
        rows=[Row(name, pruned, "float32", 1e-6, rates) for name, pruned, rates in rows],
        left_out={"torch.compile": "no compiler"},
        rounds=3,
        seconds=1.0,
        rejected=2,
        disturbed=1,
        best_share=0.5,
        versions={"slimvit": "0", "torch": "1", "timm": "2", "onnxruntime": "", "openvino": ""},
        commit="abc",
        date="2026-01-01T00:00:00Z",
    )


ROWS = [
    ("slimvit:torch", False, [100.0, 110.0, 90.0]),
    ("slimvit:torch", True, [190.0, 220.0, 198.0]),
    ("torch", False, [50.0, 50.0, 50.0]),
    ("openvino", False, [200.0, 100.0, 99.0]),
    ("openvino", True, [380.0, 200.0, 198.0]),
]


def test_ratios_are_medians_of_the_rounds_ratios():
    assert paired_ratio([2, 30, 8], [1, 10, 2]) == 3
    assert report(ROWS).ratios == pytest.approx(
        {
            "ideal": 2.0,
            "slim_over_strongest_dense": 2.0,  # openvino: 0.95, 2.2, 2.0
            "slim_over_strongest_dense_over_ideal": 1.0,
            "slim_over_own_dense": 2.0,  # 1.9, 2.0, 2.2
            "slim_over_own_dense_over_ideal": 1.0,
            "slim_over_strongest_slim": 1.0,  # 0.5, 1.1, 1.0
            "dense_over_strongest_dense": 10 / 11,  # 0.5, 1.1, 10 / 11
        }
    )


def test_ratios_without_other_runtimes():
    assert sorted(report(ROWS[:2]).ratios) == [
        "ideal",
        "slim_over_own_dense",
        "slim_over_own_dense_over_ideal",
    ]


def test_share_of_the_measured_peak():
    told = report(ROWS)
    assert told.share_of_peak(told.rows[0]) is None
    told.dense_gmacs, told.peaks = 2.0, {"float32": 800.0}
    assert [told.gflops(row) for row in told.rows[:2]] == [400.0, 396.0]  # half the MACs
    assert told.share_of_peak(told.rows[1]) == 0.495
    assert told.to_json()["rows"][0]["share_of_peak"] == 0.5
    assert [record["of_peak"] for record in told.to_csv()[:2]] == ["0.5000", "0.4950"]


def test_json_has_the_agreed_keys():
    values = json.loads(json.dumps(report(ROWS).to_json()))
    assert sorted(values) == ["batch", "cut", "device", "precision", "ratios", "rows"]
    assert len(values["rows"]) == len(ROWS)
    assert values["rows"][1] == {
        "runtime": "slimvit:torch",
        "pruned": True,
        "precision": "float32",
        "images_per_second": {"median": 198.0, "min": 190.0, "max": 220.0},
    }
    single = report(ROWS, batch=1).to_json()["rows"][2]
    assert single["latency_ms"] == pytest.approx(20.0)


def test_csv_is_added_to(tmp_path):
    path = tmp_path / "results.csv"
    append_csv(path, report(ROWS))
    append_csv(path, report(ROWS[:2]))
    with path.open(newline="") as file:
        records = list(csv.DictReader(file))
    assert len(records) == 7
    assert tuple(records[0]) == CSV_COLUMNS
    assert records[1]["kept"] == "12,5,1"
    assert (records[1]["pruned"], records[1]["median"], records[1]["speedup"]) == (
        "true",
        "198.00",
        "2.0000",
    )
    assert records[0]["speedup"] == ""
    assert all(None not in record.values() for record in records)


def test_a_csv_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="has other columns"):
        append_csv(path, report(ROWS))
    assert path.read_text() == "a,b\n1,2\n"


class Clock:
    """A time module in which a call of `run` takes a second of wall time and `share` of CPU."""

    def __init__(self, shares):
        self.shares, self.wall, self.cpu = list(shares), 0.0, 0.0

    def run(self, images):
        self.wall += 1
        self.cpu += self.shares.pop(0) if self.shares else 1.0
        return images

    def perf_counter(self):
        return self.wall

    def process_time(self):
        return self.cpu


def timed(monkeypatch, shares, rounds):
    """What `measure` finds; `shares` are of the timed calls, which follow an untimed one each."""
    clock = Clock([1.0] * _rounds._WARM_UP_CALLS + [s for share in shares for s in (1.0, share)])
    monkeypatch.setattr(_rounds, "time", clock)
    return _rounds.measure(
        [[clock.run]], torch.zeros(4, 3, 2, 2), rounds=rounds, seconds=1.0, threads=1
    )


def test_quiet_rounds_count(monkeypatch):
    found = timed(monkeypatch, [1.0, 0.95, 0.9], rounds=3)
    assert found.rates == [[[4.0, 4.0, 4.0]]]
    assert (found.rejected, found.disturbed, found.best_share) == (0, 0, 1.0)


def test_disturbed_rounds_are_repeated(monkeypatch):
    found = timed(monkeypatch, [1.0, 0.5, 0.6, 1.0, 1.0], rounds=3)
    assert (found.rejected, found.disturbed) == (2, 0)


def test_a_round_is_disturbed_in_the_light_of_later_ones(monkeypatch):
    found = timed(monkeypatch, [0.5, 1.0], rounds=2)
    assert (found.rejected, found.disturbed) == (1, 0)


def test_repeats_are_bounded(monkeypatch):
    found = timed(monkeypatch, [1.0] + [0.5] * 50, rounds=3)
    assert (found.rejected, found.disturbed) == (3, 2)
    assert len(found.rates[0][0]) == 3


def test_rounds_alternate():
    order = []
    runs = [[lambda images, name=name: order.append(name)] for name in "abc"]
    _rounds.measure(runs, torch.zeros(1, 3, 2, 2), rounds=2, seconds=1e-9, threads=1)
    turns = "".join(order)[3 * _rounds._WARM_UP_CALLS :]
    assert turns.startswith("aabbccaabbcc")  # one untimed and one timed call each


def test_the_commit_is_of_a_checkout(tmp_path, monkeypatch):
    assert _machine._git(tmp_path, "rev-parse", "HEAD") is None
    monkeypatch.setattr(_machine.slimvit, "__file__", str(tmp_path / "__init__.py"))
    assert _machine.commit() == ""


def test_the_command(tmp_path, capsys):
    arguments = ["bench", "--model", "test_vit", "--img-size", "64", "--num-classes", "10"]
    arguments += ["--keep", "12,9x2,5x2,1", "-b", "1", "--rounds", "2", "--seconds", "0.002"]
    arguments += ["--threads", "1", "--against", "torch", "--backend", "torch"]
    files = ["--json", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv")]
    assert main([*arguments, *files]) == 0
    out = capsys.readouterr().out
    assert "slim / strongest dense (torch)" in out
    assert "slim / own dense" in out
    assert "of the ideal" in out
    assert " ms " in out
    values = json.loads((tmp_path / "r.json").read_text())
    assert [(row["runtime"], row["pruned"]) for row in values["rows"]] == [
        ("slimvit:torch", False),
        ("slimvit:torch", True),
        ("torch", False),
    ]
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "one of the arguments --masks --absorb --keep is required"),
        (["--keep", "12,9,oops"], "kept counts look like"),
        (["--keep", "9,12,5,5,5,1"], "must not grow with depth"),
        (["--keep", "12,9,5"], "keep must be"),
        (["--keep", "12,9,9,5,5,1", "--against", "tensorrt"], "unknown runtime 'tensorrt'"),
        (["--keep", "12,9,9,5,5,1", "--backend", "x"], "invalid choice"),
        (["--keep", "12,9,9,5,5,1", "--json", "no/such/folder.json"], "does not exist"),
    ],
)
def test_the_command_refuses_bad_usage(capsys, options, message):
    arguments = ["bench", "--model", "test_vit", "--img-size", "64", *options]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def script(name):
    """A script of benchmarks/, which is no package."""
    path = Path(__file__).parent.parent / "benchmarks" / f"{name}.py"
    found = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    module = sys.modules[found.name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_charts_are_drawn_from_the_results(tmp_path):
    append_csv(tmp_path / "speed.csv", report(ROWS))
    (tmp_path / "accuracy.csv").write_text(
        "model,method,score,block_epochs,semantics,cut,top1,dense_top1\n"
        "vit,search,eq6,0,drop,0.35,77.0,80.0\n"
        "vit,search,eq6,3,drop,0.46,75.0,80.0\n"
        'vit,counts,"random, seed 1",0,drop,0.46,70.0,80.0\n'
        "vit,absorb 0.41,absorb,,drop,0.41,79.0,80.0\n"
        "vit,counts,eq6,0,zero,0.46,1.0,80.0\n"
    )
    chart = script("chart")
    chart.main([str(path) for path in sorted(tmp_path.glob("*.csv"))])
    with (tmp_path / "accuracy.csv").open() as file:
        figure = chart.accuracy(list(csv.DictReader(file)))
    drawn = {line.get_label() for line in figure.axes[0].get_lines()}
    assert drawn == {
        *("search", "search with block fine-tuning", "counts, random", "absorb", "dense")
    }
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["accuracy.png", "speed-a-processor-t1-b8-float32.png"]


def test_the_matrix_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    run = script("run")
    create = run.models.create
    small = {"img_size": 64, "num_classes": 10}
    monkeypatch.setattr(run.models, "create", lambda name, **options: create(name, **small))
    output = tmp_path / "results" / "speed.csv"
    arguments = ["--models", "test_vit", "--precisions", "float32", "--keep", "12,9x2,5x2,1"]
    arguments += ["--against", "torch", "--threads", "1", "--rounds", "1", "--seconds", "0.001"]
    run.main([*arguments, "--output", str(output), "--batches", "1"])
    assert len(output.read_text().splitlines()) == 4
    run.main([*arguments, "--output", str(output), "--batches", "1", "2"])
    assert "batch 1, float32: already in" in capsys.readouterr().out
    assert len(output.read_text().splitlines()) == 7
    again = [*arguments, "--output", str(output), "--batches", "1", "--backend", "torch"]
    run.main(again)
    assert len(output.read_text().splitlines()) == 10
    run.main([*again, "--against"])  # less than what is there
    assert "already in" in capsys.readouterr().out
    monkeypatch.setitem(RUNTIMES, "other", Other)
    run.main([*again, "--against", "other"])
    text = output.read_text()
    assert [line.split(",")[0] for line in text.splitlines()].count("date") == 1
    assert text.count(",other,") and text.count(",slimvit:torch,") == 4
