"""The demo: its digits, the shipped weights and their training script, the run from end to end."""

import json
import sys
from dataclasses import replace
from importlib.resources import files

import pytest
import torch

from slimvit import Masks, cli, demo, macs, models

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from slimvit.demo import _dynamic, _model, _pipeline, train
from slimvit.errors import CheckpointError, DataError, SlimvitError

TINY = demo.Settings(
    tolerance=0.05, calibration=8, granularity=72, epochs=1, training=32, held_out=20,
    compare="test_vit", batch=2, precision="float32", against=("torch",), rounds=1, seconds=0.01,
)  # fmt: skip


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def outcome(told):
    return demo.run(TINY, say=told.append, progress=False)


def test_splits_are_stratified_fixed_and_all_of_the_digits():
    train_split, held_out = demo.load_splits()
    assert (len(train_split.labels), len(held_out.labels)) == (1347, 450)
    shares = held_out.labels.bincount() / (
        train_split.labels.bincount() + held_out.labels.bincount()
    )
    assert (shares - 0.25).abs().max() < 0.01
    again = demo.load_splits()[1]
    assert (again.images == held_out.images).all()
    from sklearn.datasets import load_digits

    both = torch.cat([train_split.images, held_out.images]).flatten(1) * 16
    rows = sorted(map(tuple, both.tolist()))
    assert rows == sorted(map(tuple, load_digits().data.tolist()))


def test_missing_scikit_learn_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install scikit-learn") as caught:
        demo.load_splits()
    assert "\n" not in str(caught.value)


def test_batches_repeat_unless_they_train():
    split = demo.load_splits()[0].first(10)
    fixed, training = demo.Batches(split, 4), demo.Batches(split, 4, training=True)
    assert [len(labels) for _, labels in fixed] == [4, 4, 2]
    assert len(fixed) == len(training) == 3
    first, second = (torch.cat([images for images, _ in fixed]) for _ in range(2))
    assert (first == second).all()
    one, two = ([labels.tolist() for _, labels in training] for _ in range(2))
    assert one != two
    training.epoch = 0
    assert [labels.tolist() for _, labels in training] == one


def test_held_out_pictures_do_not_depend_on_the_batch_size():
    split = demo.load_splits()[1].first(5)
    by_two, by_five = (demo.held_out_batches(split, size) for size in (2, 5))
    images = torch.cat([images for images, _ in by_two])
    assert images.shape == (5, 3, 48, 48)
    assert (images == by_five[0][0]).all()
    assert images.min() >= -1 and images.max() <= 1
    edge = images[:, :, [0, -1]].std(dim=3).mean()
    assert images[:, :, 12:36].std(dim=3).mean() > 3 * edge  # the digit is in the middle


def test_shipped_weights_reach_the_stated_accuracy():
    weights = files("slimvit.demo") / _model.WEIGHTS
    assert len(weights.read_bytes()) <= 2_000_000
    stated = demo.facts()
    assert stated["top1"] >= 97
    top1 = train.accuracy(demo.load(), demo.held_out_batches(demo.load_splits()[1]))
    assert abs(top1 - stated["top1"]) <= 0.5
    defaults = vars(train.parser().parse_args([]))
    assert stated["settings"] == {key: defaults[key] for key in stated["settings"]}


def test_digits_model_is_known_by_its_shape():
    shape = models.spec(demo.build())
    assert shape.name == "slimvit_digits"
    assert (shape.depth, shape.width, shape.tokens, shape.num_classes) == (8, 96, 145, 10)
    assert shape.image_size == (48, 48)


def test_training_script(tmp_path, capsys):
    output = tmp_path / "w.safetensors"
    tiny = ["--epochs", "1", "--samples", "40", "--full-epochs", "0", "--output", str(output)]
    threads = torch.get_num_threads()
    try:
        assert train.main(tiny) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    stated = demo.facts(output)
    assert f"held-out top-1 {stated['top1']:.2f} %" in out
    assert stated["settings"]["samples"] == 40
    model = demo.load(output)
    assert not model.training
    assert model.pos_embed.dtype == torch.float32


def test_training_refuses_a_missing_folder(tmp_path, capsys):
    assert train.main(["--output", str(tmp_path / "absent" / "w.safetensors")]) == 1
    assert "absent does not exist" in capsys.readouterr().err
    with pytest.raises(CheckpointError):
        demo.load(tmp_path / "w.safetensors")


@pytest.mark.parametrize("wanted", [0.2, 0.45, 0.7])
def test_same_cut_for_another_depth(wanted):
    masks = Masks.from_counts((120, 90, 90, 60, 60, 40, 40, 1), (12, 12))
    shape = models.spec(models.create("deit_tiny_distilled_patch16_224"))
    other = _pipeline.same_cut(shape, masks, wanted)
    assert macs.cut(shape, other) == pytest.approx(wanted, abs=0.003)
    assert (other.depth, other.counts[-1]) == (12, 2)
    models.check_masks(other, shape)


def test_run_from_end_to_end(outcome, told):
    masks = outcome.masks
    assert masks.model == "slimvit_digits"
    assert masks.depth == 8 and masks.counts[-1] == 1 and 0 < outcome.search.cut < 1
    assert outcome.search.model is not None  # block fine-tuning took place
    assert outcome.pruned.images == outcome.final.images == 20
    assert outcome.digits.cut == pytest.approx(outcome.search.cut)
    assert outcome.compare.model == "test_vit"
    assert 0 < outcome.compare.cut <= outcome.digits.cut + 0.05
    for report in (outcome.digits, outcome.compare):
        assert {(row.runtime.split(":")[0], row.pruned) for row in report.rows} == {
            ("slimvit", False), ("slimvit", True), ("torch", False),
        }  # fmt: skip
    assert all(any(f"[{i}/6]" in line for line in told) for i in range(1, 7))


def test_ways_of_choosing_share_the_cut(outcome):
    dense, static, spvit, dps = outcome.ways
    shape = outcome.shapes[0]
    assert dense.final is None and dense.patches == 1
    assert dense.gmacs == macs.gmacs(shape)
    assert static.gmacs == macs.gmacs(shape, outcome.masks) and dps.gmacs > static.gmacs
    assert static.patches == pytest.approx(dps.patches)
    plan = _dynamic.same_share(shape, outcome.search.cut)
    assert spvit.gmacs == macs.gmacs(shape, plan)
    assert all(way.images_per_second > 0 for way in outcome.ways)
    assert all(way.final.images == 20 for way in outcome.ways[1:])
    assert outcome.ways[1].final == outcome.final
    table = demo.ways(outcome)
    assert {len(row) for row in table} == {len(demo.WAYS_HEADER)}
    assert [row[0] for row in table] == [way.name for way in outcome.ways]
    assert table[0][3] == f"{outcome.final.dense_top1:.1f}"
    text = demo.to_markdown(outcome)
    assert all(f"| {' | '.join(row)} |" in text for row in table)
    assert demo.to_json(outcome)["ways"][2]["gmacs"] == spvit.gmacs


@pytest.mark.parametrize("wanted", [0.2, 0.45, 0.6])
def test_spvit_of_the_same_share(wanted):
    shape = models.spec(demo.build())
    plan = _dynamic.same_share(shape, wanted)
    assert macs.cut(shape, plan) == pytest.approx(wanted, abs=0.01)


def test_ways_can_be_left_out():
    settings = replace(TINY, dynamic_epochs=0)
    assert _pipeline._ways(None, None, None, None, None, settings, False) == []


def test_table_report_and_json(outcome):
    table = demo.rows(outcome)
    assert {len(row) for row in table} == {len(demo.HEADER)}
    by_name = {row[0]: row[1:] for row in table}
    shape = outcome.shapes[0]
    dense, slim = macs.gmacs(shape), macs.gmacs(shape, outcome.masks)
    assert by_name["GMACs an image"][:3] == [f"{dense:.3f}", f"{slim:.3f}", f"{slim / dense:.2f}"]
    assert by_name["held-out top-1, %"][1] == f"{outcome.final.top1:.1f}"
    torch_row = by_name["images/s, torch float32"]
    rate = outcome.digits.find("torch", pruned=False).images_per_second()["median"]
    assert torch_row[:3] == [f"{rate:.0f}", "", ""]
    values = json.loads(json.dumps(demo.to_json(outcome)))
    assert values["kept"] == list(outcome.masks.counts)
    assert values["final"]["images"] == 20
    text = demo.to_markdown(outcome)
    assert all(f"| {' | '.join(row)} |" in text for row in table)


def test_command_writes_its_folder(outcome, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(demo, "run", lambda settings, **_: asked.append(settings) or outcome)
    folder = tmp_path / "new" / "demo-out"
    flags = ["--seconds", "0.1", "--rounds", "2", "-b", "1", "--precision", "float32"]
    assert cli.main(["demo", "--output-dir", str(folder), "--device", "cpu", *flags]) == 0
    assert (asked[0].seconds, asked[0].rounds, asked[0].batch) == (0.1, 2, 1)
    names = {"masks.safetensors", "kept.png", "pyramid.png", "report.md", "demo.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert Masks.load(folder / "masks.safetensors").counts == outcome.masks.counts
    assert json.loads((folder / "demo.json").read_text())["cut"] == outcome.digits.cut
    out = capsys.readouterr().out
    assert "held-out top-1, %" in out and str(folder) in out


def test_the_json_may_be_named(outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "run", lambda settings, **_: outcome)
    named = ["demo", "--output-dir", str(tmp_path), "--json", str(tmp_path / "demo.json")]
    assert cli.main(named) == 0
    assert (tmp_path / "demo.json").is_file()


def test_command_refuses_what_it_could_not_write(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run", lambda *_, **__: pytest.fail("it began"))
    (tmp_path / "demo.json").mkdir()
    assert cli.main(["demo", "--output-dir", str(tmp_path)]) == 2
    assert "demo.json must be a file" in capsys.readouterr().err


def test_a_back_end_that_does_not_work_is_told_ahead(told):
    lines = len(told)
    with pytest.raises(SlimvitError, match="back end cuda: "):
        demo.run(replace(TINY, backend="cuda", precision="float32"), say=told.append)
    assert len(told) == lines


def test_help_tells_the_precision_that_is_taken(capsys):
    assert cli.main(["demo", "--help"]) == 0
    assert "default bfloat16 where" in " ".join(capsys.readouterr().out.split())


def test_command_refuses_a_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--output-dir", str(tmp_path / "file")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--output-dir" in err
