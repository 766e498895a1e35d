"""Benchmarks of dynamic plans: their rows, their ratios, and what is not timed."""

import csv
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from references import build, random_images
from test_bench import QUICK, Other
from test_bench_report import ROWS, report

from slimvit import Absorb, apply_masks
from slimvit.bench import CSV_COLUMNS, RUNTIMES, Row, _rounds, _run, append_csv, bench, check_csv
from slimvit.bench._runtimes import OnnxRuntime, Slimvit
from slimvit.bench._verify import agreement, verify_kept, verify_plan
from slimvit.cli.bench import describe
from slimvit.dynamic import DPS, Static
from slimvit.errors import MismatchError, PlanError, UsageError
from slimvit.macs import cut
from slimvit.masks import Masks
from slimvit.models import spec

COUNTS = (12, 6, 1)
TORCH = {**QUICK, "backend": "torch", "against": []}


@pytest.fixture
def vit(tiny_vit):
    tiny_vit.blocks = tiny_vit.blocks[:3]
    return tiny_vit


def planned(rows=ROWS):
    """A report whose slim rows are a plan's, with a static twin."""
    told = report(rows)
    for row in told.rows:
        row.plan = "absorb" if row.pruned else ""
    twin = Row("slimvit:torch static", True, "float32", 1e-6, [200.0, 200.0, 220.0], "static", 0.6)
    told.rows.insert(2, twin)
    return told


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("plan", [Absorb(counts=COUNTS), DPS(COUNTS)], ids=["absorb", "dps"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_plan_has_a_static_twin(vit, plan, precision, batch):
    found = bench(vit, plan, **{**TORCH, "batch": batch}, precision=precision)
    assert [(row.runtime, row.pruned, row.plan) for row in found.rows] == [
        ("slimvit:torch", False, ""),
        ("slimvit:torch", True, plan.kind),
        ("slimvit:torch static", True, "static"),
    ]
    shape, (dense, slim, twin) = spec(vit), found.rows
    assert (dense.agreement, twin.agreement) == (None, None)
    assert slim.agreement >= (0.95 if precision == "float32" else 0.85)
    assert found.cut == cut(shape, plan.bind(shape))
    assert twin.cut == cut(shape, Masks.from_counts(COUNTS, shape.grid, shape.prefix))
    assert found.plan == plan.kind
    assert found.ratios["plan_over_static"] > 0


def test_masks_as_a_plan_are_told_from_masks(vit):
    masks = Masks.from_counts(COUNTS, (4, 4))
    found = bench(vit, Static(masks), **TORCH)
    assert found.plan == found.rows[1].plan == "static-plan" and found.rows[1].dynamic
    assert [row.dynamic for row in found.rows] == [False, True, False]
    assert "fewer MACs by static-plan\n" in describe(found)


def test_masks_have_no_twin(vit):
    found = bench(vit, Masks.from_counts(COUNTS, (4, 4)), **TORCH)
    assert [row.plan for row in found.rows] == ["", "static"]
    assert found.plan == "static"
    assert "plan_over_static" not in found.ratios


def test_ratios_of_a_plan():
    told = planned()
    assert told.ratios["plan_over_static"] == pytest.approx(0.95)  # 0.95, 1.1, 0.9
    assert told.ratios["slim_over_own_dense"] == report(ROWS).ratios["slim_over_own_dense"]
    assert told.speedup(told.rows[2]) == pytest.approx(2.0)  # 2.0, 1.82, 2.44
    told.dense_gmacs = 2.0
    assert told.gflops(told.rows[1]) == pytest.approx(2 * 2 * 0.5 * 198)
    assert told.gflops(told.rows[2]) == pytest.approx(2 * 2 * 0.4 * 200)


def test_the_dense_answer_does_not_pass_for_a_plan(vit, monkeypatch):
    """Its logits may: absorbing changes them little. The tokens do not."""
    monkeypatch.setattr(_rounds, "_round", lambda *_: pytest.fail("it was timed"))
    all_of_them = torch.arange(17).expand(2, -1)
    monkeypatch.setattr(Slimvit, "kept_sets", lambda self, images: [all_of_them] * 3)
    with pytest.raises(MismatchError, match=r"slimvit:torch \(pruned, float32\).* of the places"):
        bench(vit, Absorb(counts=COUNTS), **TORCH)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_other_scores_are_not_timed(vit, monkeypatch, precision):
    """A planner that keeps as many tokens by other scores."""
    prepare = Slimvit.prepare
    wrong = DPS(COUNTS).bind(spec(vit))

    def other(self, work, pruned):
        prepare(self, work, pruned)
        if pruned:
            self._accelerate(work, wrong)

    monkeypatch.setattr(Slimvit, "prepare", other)
    monkeypatch.setattr(_rounds, "_round", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(MismatchError, match=r"pruned.*(off the float32|of the places)"):
        bench(vit, Absorb(counts=COUNTS), **TORCH, precision=precision)


class Scaled(Other):
    """Right where it is dense, and 1 % too much where it is pruned."""

    def prepare(self, work, pruned):
        super().prepare(work, pruned)
        self.scale = 1.01 if pruned else 1.0


def test_a_foreign_runtime_is_compared_too(vit, monkeypatch):
    monkeypatch.setitem(RUNTIMES, "other", Other)
    found = bench(vit, DPS(COUNTS), **{**TORCH, "against": ["other"]})
    assert found.find("other", pruned=True).plan == "dps"
    monkeypatch.setitem(RUNTIMES, "other", Scaled)
    with pytest.raises(MismatchError, match=r"other \(pruned, float32\)"):
        bench(vit, DPS(COUNTS), **{**TORCH, "against": ["other"]})


class Exported(OnnxRuntime):
    """What ONNX Runtime may run, with timm's answers."""

    prepare, __call__, scale = Other.prepare, Other.__call__, 1.0


@pytest.mark.parametrize("against", [None, ["onnxruntime"]])
def test_a_plan_that_no_file_holds_costs_no_dense_row(vit, monkeypatch, against):
    monkeypatch.setattr(_run, "RUNTIMES", {"onnxruntime": Exported})
    monkeypatch.setattr(Exported, "why_not", classmethod(lambda cls, setting: None))
    plan = Absorb(counts=COUNTS, thresholds=[0.1] * 3)
    found = bench(vit, plan, **{**TORCH, "against": against})
    assert [row.pruned for row in found.rows if row.runtime == "onnxruntime"] == [False]
    assert found.left_out.keys() == {"onnxruntime slim"}
    assert "without onnxruntime slim: absorb keeps another number of patches" in describe(found)
    assert "such as prune makes without --per-image" in describe(found)
    assert found.ratios["slim_over_strongest_dense"] > 0


def test_agreement_is_of_patches_that_were_chosen():
    plan = DPS([17, 5, 1]).bind(spec(build("deit")))
    all_of_them, class_token = torch.arange(17).expand(2, -1), torch.zeros(2, 1, dtype=torch.int64)
    one = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]])
    other = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 8, 9]])
    shares = agreement([all_of_them, one, class_token], [all_of_them, other, class_token], plan)
    assert shares.tolist() == [1.0, 0.5]
    with pytest.raises(MismatchError, match=r"in 75.0 % of the places, fewer than 95 %"):
        verify_kept("x", "float32", shares)
    with pytest.raises(MismatchError, match="fewer than 85 %"):
        verify_kept("x", "bfloat16", shares)
    assert verify_kept("x", "bfloat16", torch.tensor([1.0, 0.8])) == pytest.approx(0.9)
    wider = agreement([all_of_them] * 3, [all_of_them, other, class_token], plan)
    assert wider.tolist() == pytest.approx([0.4, 0.4])  # 2 · 4 / (16 + 4)


def test_the_median_image_counts():
    wanted = torch.ones(5, 4)
    got = wanted.clone()
    got[0] = 9
    assert verify_plan("x", "float32", got, wanted) == 0
    got[1:3] = 9
    with pytest.raises(MismatchError, match="off the float32 reference, more than 0.2"):
        verify_plan("x", "bfloat16", got, wanted)
    with pytest.raises(MismatchError, match="inf off"):
        verify_plan("x", "float32", wanted * torch.nan, wanted)


def test_a_plan_of_another_model(vit):
    with pytest.raises(PlanError, match="the plan is of"):
        bench(vit, DPS(COUNTS).bind(spec(build("deit"))), **TORCH)


class TestCsv:
    def test_rows_name_their_plan(self, tmp_path):
        append_csv(tmp_path / "r.csv", planned())
        with (tmp_path / "r.csv").open(newline="") as file:
            records = list(csv.DictReader(file))
        assert [record["plan"] for record in records] == ["", "absorb", "static", "", "", "absorb"]
        assert [record["cut"] for record in records[:3]] == ["0.5000", "0.5000", "0.6000"]
        assert None not in records[0]

    def test_rows_of_runs_that_end_together(self, tmp_path):
        path, report = tmp_path / "r.csv", planned()

        def append(_):
            for _ in range(5):
                append_csv(path, report)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(append, range(8)))
        assert len(path.read_text().splitlines()) == 1 + 8 * 5 * len(report.rows)

    @pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"x" * 200_000])
    def test_no_csv_file(self, tmp_path, content):
        path = tmp_path / "r.csv"
        path.write_bytes(content)
        for call in (check_csv, lambda path: append_csv(path, planned())):
            with pytest.raises(UsageError, match=r"r\.csv must be a CSV file in UTF-8"):
                call(path)
        assert path.read_bytes() == content

    def test_columns_of_something_else(self, tmp_path):
        path = tmp_path / "r.csv"
        path.write_text(",".join(CSV_COLUMNS[:-1]) + "\n")
        with pytest.raises(UsageError, match="other columns"):
            append_csv(path, planned())
        with pytest.raises(UsageError, match="other columns"):
            check_csv(path)


def test_a_reference_is_not_disturbed(vit):
    """Rows run the plan's copies: the model that is given answers as before."""
    images = random_images(vit, 2)
    with torch.no_grad():
        before = vit(images)
        bench(vit, DPS(COUNTS), **TORCH)
        assert torch.equal(vit(images), before)
        assert apply_masks(vit, DPS(COUNTS))(images).shape == before.shape
