"""What a benchmark tells: ratios, JSON, CSV. Its rows are made up."""

import csv
import json

import pytest

from slimvit.bench import CSV_COLUMNS, Report, Row, _machine, append_csv
from slimvit.bench._report import paired_ratio
from slimvit.cli.bench import describe
from slimvit.errors import UsageError

COUNTS = (12, 5, 1)


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
    path.write_text(path.read_text().rstrip("\n"))  # as an editor may leave it
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


def test_the_commit_is_of_a_checkout(tmp_path, monkeypatch):
    assert _machine._git(tmp_path, "rev-parse", "HEAD") is None
    monkeypatch.setattr(_machine.slimvit, "__file__", str(tmp_path / "__init__.py"))
    assert _machine.commit() == ""


def test_a_busy_machine_is_told_before_the_ratios():
    text = describe(report(ROWS))
    assert text.count("no row got more than") == 1
    assert text.index("\nwarning: no row got more than 50 % of") < text.index("\nslim / strongest")
