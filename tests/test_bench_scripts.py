"""Scripts of benchmarks/: what their rows tell, and what they refuse before the work."""

import pytest
from PIL import Image
from test_bench import script

from slimvit import Absorb


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


def test_the_roofline_says_why_it_cannot_be_measured(monkeypatch):
    roofline = script("roofline")
    monkeypatch.setattr(roofline, "_cpu", None)
    monkeypatch.setattr(roofline._extensions, "why_not", lambda name: f"{name} is not built")
    with pytest.raises(SystemExit, match="_cpu is not built"):
        roofline.main([])
