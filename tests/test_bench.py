"""The benchmark's structure and its refusals; no figure of speed is asserted anywhere."""

import csv
import importlib.util
import json

import pytest
import torch
from PIL import Image

from slimvit import Absorb, apply_masks
from slimvit import bench as benchmarks
from slimvit.bench import RUNTIMES, Runtime, _rounds, bench, format_keep, parse_keep
from slimvit.cli import main
from slimvit.errors import MismatchError, SlimvitError, UsageError
from slimvit.export import sample_images
from slimvit.macs import cut, gmacs, mean_gmacs
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
    "text",
    ["", "1,,2", "a", "3x", "x3", "-1", "1.5", "3x0", "0x0", "5,0", "5,5,", "5,6", "3x9999999"],
)
def test_kept_counts_are_refused(text):
    with pytest.raises(UsageError, match="kept counts must be whole numbers n1,"):
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


@pytest.mark.parametrize("slim_only", [False, True])
def test_a_runtime_that_fails_is_left_out_with_the_reason(vit, masks, monkeypatch, slim_only):
    prepare = Other.prepare

    def fail(self, work, pruned):
        if not slim_only or pruned:
            raise RuntimeError("no such instruction\nat line 3")
        prepare(self, work, pruned)

    monkeypatch.setattr(benchmarks._run, "RUNTIMES", {"other": Other})
    monkeypatch.setattr(Other, "prepare", fail)
    report = bench(vit, masks, **QUICK)
    assert report.left_out == {"other" + " slim" * slim_only: "no such instruction"}
    assert (report.find("other", pruned=False) is not None) == slim_only
    assert report.find("other", pruned=True) is None
    with pytest.raises(SlimvitError, match="runtime other: no such instruction"):
        bench(vit, masks, against=["other"], **QUICK)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"seconds": float("nan")}, "seconds must be finite and above 0, got nan"),
        ({"precision": "int8"}, "precision must be one of"),
        ({"against": ["tensorrt"]}, "each of against must be one of .*, got 'tensorrt'"),
        ({"against": "torch"}, "against must be names in a list, got 'torch'"),
        ({"images": torch.zeros(1, 3, 64, 64)}, "at least one batch of 2, got 1"),
        ({"images": torch.zeros(2, 3, 64, 8)}, r"\[M, 3, 64, 64\], floating point, got \[2, 3, 64"),
        ({"images": torch.zeros(2, 3, 64, 64).int()}, r"got \[2, 3, 64, 64\], torch.int32"),
        ({"images": "photographs"}, r"got str$"),
    ],
)
def test_bad_arguments_are_refused(vit, masks, options, message):
    with pytest.raises(UsageError, match=message):
        bench(vit, masks, **{**QUICK, "against": [], **options})


@pytest.mark.parametrize("starts", [(0, 2, 4, 0), (0, 2)])
def test_every_round_times_another_batch(vit, monkeypatch, starts):
    """The cut is that of the images that were timed, each keeping what it takes."""
    timed = []
    monkeypatch.setattr(
        _rounds, "_round", lambda run, images, *_: timed.append(images) or _rounds.Round(1.0, 1.0)
    )
    plan = Absorb(counts=COUNTS, thresholds=[0.05] * 3)
    images = sample_images((3, 64, 64), 7, seed=5).double()
    options = QUICK | {"rounds": len(starts), "against": [], "backend": "torch"}
    report = bench(vit, plan, images=images, **options)
    rows = len(report.rows)
    wanted = [images[start : start + 2].float() for start in starts]
    assert all(map(torch.equal, timed, [batch for batch in wanted for _ in range(rows)]))
    assert report.images == max(starts) + 2
    slim = apply_masks(vit, plan).eval()
    executed = mean_gmacs(spec(vit), slim.plan, slim, [images[: report.images].float()])
    assert report.cut == pytest.approx(1 - executed / gmacs(spec(vit)))
    assert bench(vit, plan, images=images[-2:], **options).cut != report.cut


def test_the_command_on_photographs(tmp_path, capsys):
    for i in range(5):
        colour = torch.randint(256, (9, 9, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(colour.byte().numpy()).save(tmp_path / f"{i}.png")
    arguments = ["bench", "--model", "test_vit", "--img-size", "64", "--absorb", "0.3"]
    arguments += ["--seconds", "0.002", "--threads", "1", "--against", "none"]
    arguments += ["--backend", "torch", "--data-dir", str(tmp_path), "-b", "2"]
    assert main([*arguments, "--rounds", "2", "--csv", str(tmp_path / "r.csv")]) == 0
    assert "timed on 4 images, a batch of 2 in each round" in capsys.readouterr().out
    with (tmp_path / "r.csv").open(newline="") as file:
        assert {record["images"] for record in csv.DictReader(file)} == {"4"}
    assert main([*arguments, "--samples", "1"]) == 2
    assert "images must be at least one batch of 2, got 1" in capsys.readouterr().err


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
        (["--keep", "12,9,oops"], "--keep: kept counts must be whole numbers"),
        (["--keep", "9,12,5,5,5,1"], "that do not grow"),
        (["--keep", "12,9,5"], "--keep must be one for each of 6 blocks, got 3"),
        (["--keep", "99,9,9,5,5,1"], "--keep 99,9,9,5,5,1: kept counts must lie in"),
        (["--keep", "12,9,9,5,5,1", "--against", "tensorrt"], "openvino, got 'tensorrt'"),
        (["--keep", "12,9,9,5,5,1", "--backend", "x"], "invalid choice"),
        (["--keep", "12,9,9,5,5,1", "--import", "mine.py"], "--import needs --masks"),
        (["--absorb", "0.3", "--import", "mine.py"], "--import needs --masks"),
        (["--keep", "12,9,9,5,5,1", "--samples", "3"], "--samples needs --data-dir"),
        (["--keep", "12,9,9,5,5,1", "--json", "no/such/folder.json"], "does not exist"),
    ],
)
def test_the_command_refuses_bad_usage(capsys, options, message):
    arguments = ["bench", "--model", "test_vit", "--img-size", "64", *options]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
