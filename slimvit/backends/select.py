"""Choosing a back end: an explicit one works or raises the reason, `auto` takes the fastest."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from slimvit.backends import cpu, cuda, triton
from slimvit.checks import dtype_name
from slimvit.errors import SlimvitError, UsageError

NAMES = ("torch", "cpu", "triton", "cuda")
_FASTEST_FIRST = {"cpu": ("cpu", "torch"), "cuda": ("triton", "cuda", "torch")}
_log = logging.getLogger("slimvit")


def why_not(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> str | None:
    """The reason why a back end cannot run here, or None if it can.

    Args:
        name: one of NAMES.
        device: where the model would run.
        dtype: what it would compute in.

    Raises:
        UsageError: there is no back end of that name.
    """
    if name not in NAMES:
        raise UsageError(f"unknown back end {name!r}: one of auto, {', '.join(NAMES)}")
    if name == "cpu":
        return cpu.why_not(device, dtype)
    if name == "triton":
        return triton.why_not(device, dtype)
    if name == "cuda":
        return cuda.why_not(device, dtype)
    if torch.device(device).type == "cpu" and dtype == torch.float16:
        return cpu.not_on_cpus(dtype)
    return None


def choose(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    refuses: Callable[[str], str | None] = lambda _: None,
) -> str:
    """The back end to use: `name` itself, or the fastest that works for "auto".

    Args:
        name: one of NAMES, or "auto".
        device: where the model runs.
        dtype: what it computes in.
        refuses: the reason why a back end does not compute this very model, or None.

    Raises:
        SlimvitError: an explicit back end cannot run here; the message has the reason.
    """
    if name != "auto":
        reason = why_not(name, device, dtype)
        if reason is not None:
            raise SlimvitError(f"back end {name}: {reason} (slimvit doctor tells what works here)")
        reason = refuses(name)
        if reason is not None:
            raise SlimvitError(f"back end {name} does not compute this model: {reason}")
        return name
    passed: dict[str, str] = {}
    for candidate in _FASTEST_FIRST.get(torch.device(device).type, ("torch",)):
        reason = why_not(candidate, device, dtype) or _slower(candidate, dtype)
        if reason is not None:
            passed[candidate] = reason
            continue
        reason = refuses(candidate)
        if reason is None:
            # Another set of fused kernels does as well; plain PyTorch is worth a warning.
            slow = candidate == "torch"
            for name, reason in passed.items():
                level = logging.WARNING if slow else logging.DEBUG
                _log.log(level, "back end %s passed over: %s", name, reason)
            return candidate
        _log.warning("back end %s passed over for this model: %s", candidate, reason)
    raise SlimvitError(f"no back end computes {dtype_name(dtype)} on {device}: {reason}")


def _slower(name: str, dtype: torch.dtype) -> str | None:
    """Why `auto` passes over a back end that works: plain PyTorch must be expected to be faster."""
    if name == "triton" and dtype == torch.float32:
        return (
            "in float32 its products are not made for tensor cores; precision='float16' and "
            "'bfloat16' are"
        )
    return None
