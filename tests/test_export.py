"""Exported files answer like the model, in any batch, and appear whole or not at all."""

import logging
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from slimvit import apply_masks, export
from slimvit.bench import openvino_core
from slimvit.cli import main
from slimvit.errors import ExportError, MismatchError, UsageError
from slimvit.export import export_onnx, export_program, quiet, relative_error, sample_images
from slimvit.masks import Masks

COUNTS = (12, 5, 1)


@pytest.fixture
def vit(tiny_vit):
    """Three blocks of it: exporters take their time block by block."""
    tiny_vit.blocks = tiny_vit.blocks[:3]
    return tiny_vit


@pytest.fixture(params=("drop", "zero", "idle"))
def slim(request, vit):
    masks = Masks.from_counts(COUNTS, (4, 4), semantics=request.param)
    return apply_masks(vit, masks)


def images(batch, seed=1):
    return sample_images((3, 64, 64), batch, seed)


@torch.no_grad()
def logits(model, batch):
    return model(images(batch))


def in_onnxruntime(path, batch):
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images(batch).numpy()})[0])


def in_openvino(path, batch):
    pytest.importorskip("openvino")
    core = openvino_core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(str(path)), "CPU", options)
    return torch.from_numpy(np.array(compiled([images(batch).numpy()])[0]))


SIGNAL_AFTER_OPENVINO = """
import gc, signal, sys, threading
from slimvit.bench import openvino_core

def drop():
    compiled.clear()
    gc.collect()

core = openvino_core()
compiled = [core.compile_model(core.read_model(sys.argv[1]), "CPU")]
del core
thread = threading.Thread(target=drop)
thread.start()
thread.join()
seen = []
signal.signal(signal.SIGCHLD, lambda *_: seen.append(1))
signal.raise_signal(signal.SIGCHLD)
print(len(seen))
"""


def test_signals_are_survived_after_openvino(tiny_vit, tmp_path):
    pytest.importorskip("openvino")
    path = tmp_path / "dense.onnx"
    export_onnx(tiny_vit, path, check=False)
    command = [sys.executable, "-c", SIGNAL_AFTER_OPENVINO, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr


def test_onnx_of_a_slim_model_matches_in_both_runtimes(slim, tmp_path):
    path = tmp_path / "slim.onnx"
    export_onnx(slim, path)
    assert os.listdir(tmp_path) == ["slim.onnx"]  # weights inside, nothing left behind
    for batch in (1, 2, 5):
        wanted = logits(slim, batch)
        assert relative_error(in_onnxruntime(path, batch), wanted) < 2e-5
        assert relative_error(in_openvino(path, batch), wanted) < 2e-5


def test_onnx_of_a_dense_model_has_plain_operators_and_a_dynamic_batch(vit, tmp_path):
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "dense.onnx"
    export_onnx(vit, path)
    assert relative_error(in_onnxruntime(path, 3), logits(vit, 3)) < 2e-5
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} == {""}
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize("slim", ["drop"], indirect=True)
def test_a_fixed_batch_is_fixed(slim, tmp_path):
    path = tmp_path / "slim.onnx"
    export_onnx(slim, path, batch=2)
    assert relative_error(in_onnxruntime(path, 2), logits(slim, 2)) < 2e-5
    with pytest.raises(Exception, match="(?i)dimension"):
        in_onnxruntime(path, 3)


def test_program_matches_in_any_batch(slim, tmp_path):
    path = tmp_path / "slim.pt2"
    export_program(slim, path)
    module = torch.export.load(path).module()
    for batch in (1, 2, 5):
        assert relative_error(module(images(batch)), logits(slim, batch)) < 2e-5


def test_the_model_is_not_changed(vit, tmp_path):
    vit.to(torch.bfloat16).train()
    export_program(vit, tmp_path / "dense.pt2")
    assert vit.training
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in vit.parameters())


def test_a_file_that_answers_wrong_is_not_put_in_place(vit, tmp_path, monkeypatch):
    path = tmp_path / "dense.onnx"
    path.write_bytes(b"before")
    monkeypatch.setattr(
        export, "_onnxruntime", lambda path: lambda images: torch.ones(len(images), 10)
    )
    with pytest.raises(MismatchError, match="ONNX Runtime .* off at batch 1"):
        export_onnx(vit, path)
    assert os.listdir(tmp_path) == ["dense.onnx"]
    assert path.read_bytes() == b"before"


def test_a_file_that_does_not_run_is_not_put_in_place(vit, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such operator\nin node 3")

    vit.blocks = vit.blocks[:1]
    monkeypatch.setattr(pytest.importorskip("onnxruntime"), "InferenceSession", fail)
    with pytest.raises(ExportError, match="ONNX Runtime cannot run .*: no such operator$"):
        export_onnx(vit, tmp_path / "dense.onnx", batch=1)
    assert os.listdir(tmp_path) == []


def test_links_and_devices_stay_what_they_are(vit, tmp_path):
    kept, link, pipe = (tmp_path / name for name in ("kept.onnx", "link.onnx", "pipe"))
    kept.touch(0o600)
    link.symlink_to(kept)
    export_onnx(vit, link, check=False)
    assert link.is_symlink() and stat.S_IMODE(kept.stat().st_mode) == 0o600
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        content = pool.submit(pipe.read_bytes)
        export_onnx(vit, pipe, check=False)
        assert len(content.result(60)) == kept.stat().st_size
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert {path.name for path in tmp_path.iterdir()} == {"kept.onnx", "link.onnx", "pipe"}


def test_what_cannot_be_exported_says_so(vit, tmp_path):
    with pytest.raises(ExportError, match="Linear cannot be exported"):
        export_onnx(torch.nn.Linear(2, 2), tmp_path / "a.onnx")
    with pytest.raises(UsageError, match="opset must be at least 18, got 17"):
        export_onnx(vit, tmp_path / "a.onnx", opset=17)
    with pytest.raises(ExportError, match=r"opset must be from 18 to 2\d, .*, got 99"):
        export_onnx(vit, tmp_path / "a.onnx", opset=99, check=False)
    with pytest.raises(
        UsageError, match="batch, where it is not dynamic, must be at least 1, got 0"
    ):
        export_onnx(vit, tmp_path / "a.onnx", batch=0)
    with pytest.raises(ExportError, match="cannot write"):
        export_onnx(vit, tmp_path / "missing" / "a.onnx")
    assert os.listdir(tmp_path) == []


def test_a_missing_package_is_named(vit, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs onnx, onnxscript, onnxruntime: pip install"):
        export_onnx(vit, tmp_path / "a.onnx")


def test_quiet_leaves_logging_as_it_was():
    logging.disable(logging.INFO)
    try:
        with quiet():
            assert logging.root.manager.disable == logging.WARNING
        assert logging.root.manager.disable == logging.INFO
    finally:
        logging.disable(logging.NOTSET)


def test_relative_error_is_the_worst_image():
    wanted = torch.ones(3, 4)
    got = wanted.clone()
    got[1] *= 1.5
    assert relative_error(got, wanted) == pytest.approx(0.5)
    got[2, 0] = torch.nan
    assert relative_error(got, wanted) == float("inf")
    assert relative_error(wanted[:2], wanted) == float("inf")


def test_the_command(tmp_path, capsys):
    masks = tmp_path / "masks.safetensors"
    Masks.from_counts((12, 9, 9, 5, 5, 1), (4, 4)).save(masks)
    model = ["export", "--model", "test_vit", "--img-size", "64", "--num-classes", "10"]
    for name in ("slim.onnx", "slim.pt2"):
        output = tmp_path / name
        assert main([*model, "--masks", str(masks), "--output", str(output)]) == 0
        out = capsys.readouterr().out
        assert f"wrote {output}" in out and out.endswith("like PyTorch at batch 1 and 3\n")
        assert output.stat().st_size > 100_000
    fixed = ["--output", str(tmp_path / "fixed.onnx"), "-b", "2"]
    assert main([*model, "--masks", str(masks), *fixed]) == 0
    assert capsys.readouterr().out.endswith("like PyTorch at batch 2\n")


def test_the_command_refuses_bad_usage(tmp_path, capsys):
    model = ["export", "--model", "test_vit", "--output"]
    assert main([*model, str(tmp_path / "slim.bin")]) == 2
    assert "neither .onnx nor .pt2" in capsys.readouterr().err
    assert main([*model, str(tmp_path / "none" / "slim.onnx")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main([*model, str(tmp_path / "slim.pt2"), "-b", "2"]) == 2
    assert "ONNX files only" in capsys.readouterr().err
    assert main([*model, str(tmp_path / "slim.pt2"), "--opset", "18"]) == 2
    assert "--opset is of ONNX files only" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "name"), [("onnx", "slim.pt2"), ("pt2", "slim.onnx")])
def test_the_command_refuses_a_suffix_of_the_other_format(tmp_path, capsys, kind, name):
    output, other = tmp_path / name, name.rpartition(".")[2]
    model = ["export", "--model", "test_vit", "--img-size", "64", "--num-classes", "10"]
    assert main([*model, "--format", kind, "--output", str(output)]) == 2
    error = f"--format {kind} writes no {other} file, got --output {output}"
    assert error in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
