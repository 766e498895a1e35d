"""Files of plans of one's own: what a file would lose is refused ahead."""

import pytest
import torch
from references import build

from slimvit import Planner, load_plan
from slimvit.errors import PlanError
from slimvit.models import spec

COUNTS = [12, 6, 1]


class Sharp(Planner):
    kind = "test-sharp"

    def __init__(self, counts=None, power: float = 1.0, **_) -> None:
        super().__init__(counts)
        self.power = power


class Told(Sharp):
    kind = "test-told"

    def settings(self):
        return super().settings() | {"power": self.power}


def test_arguments_that_settings_forget_are_not_lost_in_a_file(tmp_path):
    path = tmp_path / "p.safetensors"
    with pytest.raises(PlanError, match=r"Sharp.settings must name every .*; power is missing"):
        Sharp(COUNTS, power=-1).save(path)
    assert not path.exists()
    Told(COUNTS, power=-1).save(path)
    assert load_plan(path).power == -1


class Table(Planner):
    """Keeps a tensor as it is told to."""

    kind = "test-table"

    def __init__(self, counts=None, table=(1.0, 2.0), keep="plain") -> None:
        super().__init__(counts)
        if keep == "buffer":
            self.register_buffer("scale", torch.tensor([3.0]))
        elif keep == "parameter":
            self.scale = torch.nn.Parameter(torch.tensor([3.0]))
        elif keep == "plain":
            self.scale = torch.tensor([3.0])
        self.table, self.keep = torch.tensor(table), keep

    def settings(self):
        return super().settings() | {"table": self.table.tolist(), "keep": self.keep}


def test_a_tensor_that_a_file_would_lose_is_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    rule = r"Table\.scale is a tensor .* lose: make it a buffer by register_buffer\('scale', …\)"
    for plan in (Table(COUNTS), Table(COUNTS).bind(spec(build("deit")))):
        with pytest.raises(PlanError, match=rule):
            plan.save(path)
    assert not path.exists()


@pytest.mark.parametrize("keep", ["buffer", "parameter", "none"])
def test_tensors_that_a_file_brings_back_are_none_that_it_loses(tmp_path, keep):
    path, plan = tmp_path / "p.safetensors", Table(COUNTS, (4.0, 5.0), keep)
    plan.requires_grad_(False)
    if keep != "none":
        plan.scale += 1
    plan.save(path)
    again = load_plan(path)
    assert again.table.tolist() == [4.0, 5.0]
    assert keep == "none" or again.scale.tolist() == [4.0]
