"""Exported models with dynamic plans answer like the model, whatever runs them."""

import os

import numpy as np
import pytest
import torch

from slimvit import Absorb, apply_masks, export
from slimvit.bench import openvino_core
from slimvit.dynamic import DPS, SPViT
from slimvit.dynamic.selector import Selector
from slimvit.errors import MismatchError
from slimvit.export import export_onnx, export_program, image_errors, sample_images

COUNTS = (12, 6, 1)
PLANS = {
    "absorb": Absorb(counts=COUNTS),
    "dps": DPS(COUNTS),
    "spvit": SPViT([0.6, 0.3], stages=[0, 1]),
}


@pytest.fixture
def vit(tiny_vit):
    """Three blocks of it: exporters take their time block by block."""
    tiny_vit.blocks = tiny_vit.blocks[:3]
    return tiny_vit


def images(batch, seed=1):
    return sample_images((3, 64, 64), batch, seed)


@torch.no_grad()
def off(got, slim, batch):
    """The median image's error: two scores that tie but for a bit may be ranked otherwise."""
    return image_errors(got, slim(images(batch))).median().item()


@pytest.mark.parametrize("kind", ["absorb", "spvit"])
def test_onnx_matches_in_any_batch(vit, tmp_path, kind):
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    slim, path = apply_masks(vit, PLANS[kind]), tmp_path / "slim.onnx"
    for module in slim.modules():
        if isinstance(module, Selector):  # whose heads all count for what float32 cannot hold
            module.weigh2.bias.data -= 200
    export_onnx(slim, path)
    assert os.listdir(tmp_path) == ["slim.onnx"]
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} == {""}
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        got = torch.from_numpy(session.run(None, {"images": images(batch).numpy()})[0])
        assert off(got, slim, batch) < 2e-5
    pytest.importorskip("openvino")
    core = openvino_core()
    for hint, bound in (("f32", 2e-5), ("bf16", 0.05)):
        options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": 1}
        compiled = core.compile_model(core.read_model(str(path)), "CPU", options)
        for batch in (1, 3, 8) if hint == "f32" else (8,) if kind == "absorb" else ():
            got = torch.from_numpy(np.array(compiled([images(batch).numpy()])[0]))
            assert off(got, slim, batch) < bound


@pytest.mark.parametrize("kind", PLANS)
def test_program_matches_in_any_batch(vit, tmp_path, kind):
    slim, path = apply_masks(vit, PLANS[kind]), tmp_path / "slim.pt2"
    export_program(slim, path)
    module = torch.export.load(path).module()
    for batch in (1, 2, 5):
        assert off(module(images(batch)), slim, batch) < 2e-5


def test_wrong_tokens_are_not_put_in_place(vit, tmp_path, monkeypatch):
    slim, wrong = (apply_masks(vit, PLANS[kind]) for kind in ("absorb", "dps"))
    monkeypatch.setattr(export.torch.export, "load", lambda file: _Program(wrong))
    with pytest.raises(MismatchError, match="off at batch 1"):
        export_program(slim, tmp_path / "slim.pt2")
    assert os.listdir(tmp_path) == []


class _Program:
    def __init__(self, model):
        self._model = model

    def module(self):
        return self._model


def test_one_tie_is_let_pass_and_two_thirds_are_not(vit):
    """What a median over images means: one image of three may have other tokens, two may not."""
    slim = apply_masks(vit, PLANS["absorb"])
    for wrong, passes in ((1, True), (2, False)):
        calls = []

        def run(given, wrong=wrong, calls=calls):
            calls.append(1)
            return slim(given) * (1.5 if len(calls) <= wrong else 1.0)

        if passes:
            export._compare("x", slim, run, (1,))
        else:
            with pytest.raises(MismatchError):
                export._compare("x", slim, run, (1,))
