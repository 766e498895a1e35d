"""Tensors on several devices, which a meta kernel would answer as if all were on one."""

import pytest
import torch

import slimvit.ops  # noqa: F401
from slimvit.errors import SlimvitError

NAMES = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("slimvit::")]
PLAIN = {"int": 1, "SymInt": 1, "bool": False, "float": 1.0, "str": "gelu"}


def example(kind: str, device: str) -> object:
    """An argument of a schema's type; a tensor, or one in a list, is on `device`."""
    plain = kind.removeprefix("Optional[").removeprefix("List[").removesuffix("]")
    value = torch.ones(1, device=device) if plain == "Tensor" else PLAIN[plain]
    return [value] if kind.startswith("List[") else value


@pytest.mark.parametrize("name", NAMES)
def test_one_tensor_on_meta_is_refused(name):
    op = getattr(torch.ops.slimvit, name.split("::")[1]).default
    kinds = {given.name: str(given.type) for given in op._schema.arguments}
    tensors = [given for given, kind in kinds.items() if "Tensor" in kind]
    assert len(tensors) > 1
    beside = "weight" if "weight" in tensors else tensors[0]
    for alone in set(tensors) - {beside}:
        arguments = {g: example(kind, "meta" if g == alone else "cpu") for g, kind in kinds.items()}
        rule = f"tensors of {op._opname} must be on one device, got cpu and meta"
        with pytest.raises(SlimvitError, match=f"^{rule}$"):
            op(**arguments)
