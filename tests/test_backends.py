"""Back ends: why one does not work here, and which one is taken."""

import logging

import pytest
import torch

from slimvit.backends import NAMES, choose, select, why_not
from slimvit.errors import SlimvitError, UsageError


def test_names():
    assert NAMES == ("torch", "cpu", "triton", "cuda")
    assert set(select._FASTEST_FIRST) == set(NAMES)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cuda:0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_works_everywhere(device, dtype):
    assert why_not("torch", device, dtype) is None
    assert choose("torch", device, dtype) == "torch"


def test_no_float16_on_the_cpu():
    assert why_not("torch", "cpu", torch.float16) == (
        "float16 is not computed on CPUs: use float32 or bfloat16"
    )
    assert why_not("torch", "cuda", torch.float16) is None
    for name in ("torch", "auto"):
        with pytest.raises(SlimvitError, match="float16"):
            choose(name, "cpu", torch.float16)


@pytest.mark.parametrize("name", NAMES)
def test_a_reason_is_one_line(name):
    reason = why_not(name, "cpu")
    assert reason is None or (reason and "\n" not in reason)


@pytest.mark.parametrize("name", ["tpu", "", "CPU"])
def test_unknown(name):
    with pytest.raises(UsageError, match=f"unknown back end '{name}': one of auto, torch, cpu, tr"):
        why_not(name)
    with pytest.raises(UsageError, match=f"unknown back end '{name}'"):
        choose(name, "cpu", torch.float32)


def only(*working):
    def why_not(name, device, dtype):
        return None if name in working else f"{name} is not here"

    return why_not


class TestChoice:
    def test_auto_takes_the_fastest_that_works(self, monkeypatch):
        for working, taken in (
            (NAMES, "cuda"),
            (("torch", "cpu", "triton"), "triton"),
            (("torch", "cpu"), "cpu"),
            (("torch",), "torch"),
        ):
            monkeypatch.setattr(select, "why_not", only(*working))
            assert choose("auto", "cpu", torch.float32) == taken

    def test_auto_logs_why_it_goes_on(self, monkeypatch, caplog):
        monkeypatch.setattr(select, "why_not", only("cpu", "torch"))
        with caplog.at_level(logging.DEBUG, "slimvit"):
            assert choose("auto", "cpu", torch.float32) == "cpu"
        assert [record.getMessage() for record in caplog.records] == [
            "back end cuda passed over: cuda is not here",
            "back end triton passed over: triton is not here",
        ]

    def test_auto_finds_none(self, monkeypatch):
        monkeypatch.setattr(select, "why_not", only())
        with pytest.raises(SlimvitError, match=r"no back end computes torch.float32 on cpu: .*not"):
            choose("auto", "cpu", torch.float32)

    def test_an_explicit_one_raises_the_reason(self, monkeypatch):
        monkeypatch.setattr(select, "why_not", only("torch"))
        with pytest.raises(SlimvitError, match=r"back end cpu: cpu is not here \(slimvit doctor"):
            choose("cpu", "cpu", torch.float32)
