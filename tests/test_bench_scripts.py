"""Scripts of benchmarks/: what their rows tell, and what they refuse before the work."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_bench import Other
from test_bench_report import ROWS, report

from slimvit import Absorb, apply_masks
from slimvit.bench import RUNTIMES, append_csv
from slimvit.export import relative_error, sample_images


def script(name):
    """A script of benchmarks/, which is no package."""
    path = Path(__file__).parent.parent / "benchmarks" / f"{name}.py"
    found = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    module = sys.modules[found.name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture
def experiments(tiny_vit, tmp_path, monkeypatch):
    """accuracy.py on a tiny ViT and 6 images without labels: (module, arguments, its CSV)."""
    accuracy = script("accuracy")
    monkeypatch.setattr(accuracy.models, "create", lambda name, **_: tiny_vit)
    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.new("RGB", (64, 64), (40 * i, 9, 9)).save(tmp_path / "images" / f"{i}.png")
    output = tmp_path / "results" / "accuracy.csv"
    arguments = ["--model", "test_vit", "--checkpoint", "W", "--data-dir", str(tmp_path / "images")]
    arguments += ["--calibrate", "0:4", "--validate", "4:6", "--samples", "3"]
    return accuracy, [*arguments, "--output", str(output)], output


def test_experiments_tell_how_many_images_were_learned_from(experiments, monkeypatch):
    accuracy, arguments, output = experiments
    monkeypatch.setattr(accuracy, "_percent", lambda *_: 50.0)
    monkeypatch.setattr(accuracy, "CUTS", (0.3,))

    def some(self):
        self.add("search", lambda: self.search(tolerance=0.5), tolerance=0.02)
        self.add("absorb 0.3", lambda: self.planned(Absorb(cut=0.3)), score="absorb")
        tuning = {"epochs": 1, "lr": 1e-5}
        self.add("tuned", lambda: self.search(tolerance=0.5), training=tuning, tolerance=0.02)
        output.write_text(output.read_text() + output.read_text().splitlines()[1] + "\n")
        self.add("dps, seed 0", lambda: self.predicted(0), tolerance=0.02)

    monkeypatch.setattr(accuracy.Experiments, "all", some)
    accuracy.main(arguments)
    rows = [(row["method"], row["samples"]) for row in accuracy._read(output)]
    expected = [("search", "3"), ("absorb 0.3", "0"), ("tuned", "4")]
    assert rows == [*expected, ("search", "3"), ("dps, seed 0", "4")]  # another process's row stays


def test_experiments_refuse_what_they_cannot_go_on_with(experiments):
    accuracy, arguments, output = experiments
    with pytest.raises(SystemExit, match="no search of test_vit at tolerance 0.02"):
        accuracy.main([*arguments, "--plans-only"])
    output.parent.mkdir()
    output.write_text("model,method\n")
    with pytest.raises(SystemExit, match="accuracy.csv has other columns than model, method, "):
        accuracy.main(arguments)


def test_absorbing_without_spread(tiny_vit):
    """Averages forget how far their members lay apart, and only then."""
    accuracy = script("accuracy")
    slim = apply_masks(tiny_vit, Absorb(cut=0.3)).eval()
    images = sample_images((3, 64, 64), 4)
    wanted = slim(images)
    with accuracy.without_spread():
        other = slim(images)
    assert 1e-4 < relative_error(other, wanted) < 0.5
    assert torch.equal(slim(images), wanted)


def test_the_roofline_says_why_it_cannot_be_measured(monkeypatch):
    roofline = script("roofline")
    monkeypatch.setattr(roofline, "_cpu", None)
    monkeypatch.setattr(roofline._extensions, "why_not", lambda name: f"{name} is not built")
    with pytest.raises(SystemExit, match="_cpu is not built"):
        roofline.main([])


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


def test_ratios_of_written_runs_are_those_that_were_told(tmp_path, capsys):
    path = tmp_path / "speed.csv"
    append_csv(path, report(ROWS))
    ratios = script("ratios")
    ratios.main([str(path)])
    told = report(ROWS).ratios
    wanted = [f"{told[name]:.2f}" if name in told else "" for name in ratios.TOLD]
    assert wanted == ["2.00", "1.00", "2.00", "1.00", "0.91", ""]
    last = capsys.readouterr().out.splitlines()[-1]
    head = "| test_vit | a processor | 8 | float32 |  | 50.0 % | "
    assert last == f"{head}{' | '.join(wanted)} |"
    records = path.read_text().splitlines()
    older = [records[0], *(f"{record.rsplit(',', 2)[0]},,0" for record in records[1:])]
    path.write_text("\n".join(older) + "\n")  # of the medians: 198, 100, 200 and 100 a second
    ratios.main([str(path)])
    assert "| ≈ 1.98 | ≈ 0.99 | ≈ 1.98 | ≈ 0.99 | ≈ 1.00 |  |" in capsys.readouterr().out
    path.write_text("a,b\n1,2\n")
    for of in (path, tmp_path / "none.csv"):
        with pytest.raises(SystemExit):
            ratios.main([str(of)])
    assert "none.csv" in capsys.readouterr().err


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
