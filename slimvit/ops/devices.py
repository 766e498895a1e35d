"""Where the tensors of an op are, for its meta kernel."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from slimvit.errors import SlimvitError


def require_one_device(op: str, *given: Tensor | Sequence[Tensor] | None) -> None:
    """Refuse tensors on several devices: some on meta would leave the answer's memory unwritten.

    Where the first is on meta, so is the answer, and the others may be anywhere.

    Args:
        op: its name.
        given: its tensors, lists of them, and None where one is left out; the first is the one
            beside which the answer is made.

    Raises:
        SlimvitError: they are on several devices.
    """
    tensors = [t for one in given for t in ([one] if isinstance(one, Tensor) else one or ())]
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1 and not tensors[0].is_meta:
        raise SlimvitError(f"tensors of {op} must be on one device, got {' and '.join(devices)}")
