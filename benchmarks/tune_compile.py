"""Compile candidates in other processes: Triton's cache on disk has them when they are timed."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from gpu_calls import Launch
from torch import Tensor

from slimvit.backends.fused import kernel_set


class Blank(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str


class Job(NamedTuple):
    """A launch with a configuration, for another process."""

    function: str
    arguments: dict[str, Any]
    config: tuple[int, int, int, int, int]
    device: str


def job(launch: Launch, config: tuple[int, int, int, int, int]) -> Job:
    """What another process has to launch."""
    arguments = {name: _blank(value) for name, value in launch.arguments.items()}
    return Job(launch.function.__name__, arguments, config, str(launch.tensors()[0].device))


def compile_all(jobs: Sequence[Job], processes: int, seconds: float) -> None:
    """Launch each job once; what fails says so when it is checked, what is late is left."""
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with context.Pool(min(processes, len(jobs))) as pool:
        pool.map_async(compile_one, jobs, chunksize=1).wait(seconds)


def compile_one(work: Job) -> str:
    """Launch a job on zeros; "" or what went wrong."""
    module = kernel_set("triton")
    try:
        if torch.device(work.device).type == "cuda":
            torch.cuda.set_device(work.device)  # launches are made on the current one
        with torch.no_grad():
            arguments = {name: _filled(value) for name, value in work.arguments.items()}
            arguments["config"] = module.Config(*work.config)
            getattr(module, work.function)(**arguments)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    except Exception as error:  # compilers may fail in any way
        with contextlib.suppress(Exception):
            return str(error)
        return type(error).__name__
    return ""


def _blank(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Blank(tuple(value.shape), value.dtype, str(value.device))
    return tuple(_blank(item) for item in value) if isinstance(value, tuple) else value


def _filled(value: Any) -> Any:
    if isinstance(value, Blank):
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    return tuple(_filled(item) for item in value) if isinstance(value, tuple) else value
