"""The launches of a forward pass, as the back end makes them: watched, repeated, and checked.

    with watched(lambda launch: print(launch.name, judge(launch))):
        fast(images)

Nothing here knows how a block is put together: kernels are replaced by watchers of their calls.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu_references import mapped, reference
from torch import Tensor

from slimvit.backends.fused import kernel_set

# Of a kernel's function: its name here and the stage of the table of configurations.
STAGES = {
    "patch_embedding": ("embedding", "embedding"),
    "slim_qkv": ("qkv", "qkv"),
    "slim_attention": ("attention", "attention"),
    "last_attention": ("attention", "last_attention"),
    "slim_mlp": ("proj_mlp", "mlp"),
    "whole_block": ("block", ""),
    "row_stats": ("row_stats", ""),
    "scatter_tokens": ("scatter_tokens", ""),
}
BATCHED = ("x", "stats", "residual", "index", "spread", "q", "kv", "u", "attended", "images")
CHECKED_IMAGES = 8
STATS_ERROR = 1e-4
TIMES_OWN = 2.0


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        name: as `gpu_floor` names it.
        stage: as the table of configurations names it; "" where it has none.
        function: what launches it.
        arguments: what it got, by name, defaults included.
    """

    name: str
    stage: str
    function: Callable[..., Any]
    arguments: dict[str, Any]

    def __call__(self, **changed: Any) -> Any:
        return self.function(**{**self.arguments, **changed})

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        values = self.arguments.values()
        flat = [item for v in values for item in (v if isinstance(v, tuple) else (v,))]
        return [item for item in flat if isinstance(item, Tensor)]

    def copy(self) -> Launch:
        """The same launch of tensors of its own."""
        return Launch(self.name, self.stage, self.function, mapped(self.arguments, Tensor.clone))

    def key(self) -> tuple[object, ...]:
        """Equal for launches that compute the same on tensors of the same shapes."""
        plain = [(k, v) for k, v in self.arguments.items() if isinstance(v, int | float | str)]
        return (self.name, *((t.shape, t.dtype) for t in self.tensors()), *plain)

    def table_key(self) -> tuple[int, int]:
        """Width and rows by which the table of configurations is asked."""
        a = self.arguments
        if self.stage == "embedding":
            return a["table"].shape[1], a["images"].shape[0] * a["table"].shape[0]
        if self.stage == "attention":
            return a["q"].shape[2] // a["heads"], a["q"].shape[1]
        if self.stage == "last_attention":
            return a["x"].shape[2], a["u"].shape[1]
        if self.stage == "mlp":
            return a["x"].shape[2], a["attended"].shape[0] * a["attended"].shape[1]
        batch, m, width = a["x"].shape
        rows = m if self.stage == "qkv" or a["n"] is None else a["n"]
        return width // a.get("groups", 1), batch * rows


@contextlib.contextmanager
def watched(see: Callable[[Launch], None], backend: str = "triton") -> Iterator[None]:
    """Call `see` with every launch of a back end's kernels, after it was made.

    What a kernel's function calls of the others is part of it, also when `see` repeats it.
    """
    module, last, inside = kernel_set(backend), False, False

    def watcher(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal last, inside
            if inside:
                return function(*args, **kwargs)
            bound = inspect.signature(function).bind(*args, **kwargs)
            bound.apply_defaults()
            short, stage, last = names(name, bound.arguments, last)
            inside = True
            try:
                result = function(*args, **kwargs)
                if result is not None:  # None: a whole block is left to the other kernels
                    see(Launch(short, stage, function, dict(bound.arguments)))
            finally:
                inside = False
            return result

        return call

    listed = [name for name in (*STAGES, "slim_linear") if hasattr(module, name)]
    originals = {name: getattr(module, name) for name in listed}
    try:
        for name, function in originals.items():
            setattr(module, name, watcher(name, function))
        yield
    finally:
        for name, function in originals.items():
            setattr(module, name, function)


def names(function: str, arguments: dict[str, Any], last: bool) -> tuple[str, str, bool]:
    """Name and stage of a launch, and whether it lies in a block of one or two tokens.

    Such a block begins with queries alone, so with a norm ahead of no stage of its own.
    """
    if function == "slim_linear":
        short = stage = arguments["stage"]
        if stage == "linear" and arguments["stats"] is not None:
            return "last_q", stage, True
        if stage == "linear":
            return "last_u" if arguments["bias"] is None else "last_v", stage, last
    else:
        short, stage = STAGES[function]
    if short in ("embedding", "qkv", "block", "row_stats", "scatter_tokens"):
        return short, stage, last and short == "row_stats"
    return ("last_" if last else "") + short, stage, last


@dataclass(frozen=True)
class Verdict:
    """What checking a launch found.

    Attributes:
        error: worst relative error of a row to the same formula in float64; inf if not finite.
        own: that of PyTorch in the kernel's dtype.
        limit: the largest error that passes.
    """

    error: float
    own: float
    limit: float

    @property
    def passes(self) -> bool:
        """Whether the launch may be timed."""
        return self.error <= self.limit


def judge(launch: Launch, **changed: Any) -> Verdict:
    """Run a launch on poisoned memory and compare some of its images with the reference."""
    a = launch.arguments | changed
    with poisoned():
        result = launch(**changed)
    if launch.name == "row_stats":
        error = stats_error(result, a["x"])
        return Verdict(error, error, STATS_ERROR)
    emitted = launch.name != "qkv" and isinstance(result, tuple)
    values = result if isinstance(result, tuple) else (result,)
    values, stats = (values[:1], values[1]) if emitted else (values, None)
    dtype, batch = values[0].dtype, values[0].shape[0]
    picks = torch.linspace(0, batch - 1, min(batch, CHECKED_IMAGES)).round().long()
    picks = picks.to(values[0].device)
    some = {
        k: v[picks] if k in BATCHED and isinstance(v, Tensor) and v.dim() > 1 else v
        for k, v in a.items()
    }
    name = launch.function.__name__
    wanted = reference(name, some, torch.float64)
    own = reference(name, some, dtype)
    error = max(row_error(g[picks], w) for g, w in zip(values, wanted, strict=True))
    own_error = max(row_error(o, w) for o, w in zip(own, wanted, strict=True))
    if stats is not None and not stats_error(stats[picks], values[0][picks]) <= STATS_ERROR:
        error = float("inf")
    return Verdict(error, own_error, TIMES_OWN * own_error + torch.finfo(dtype).eps)


def stats_error(stats: Tensor, values: Tensor) -> float:
    """How far emitted statistics are from those of the values, as these were rounded."""
    parts = values.double().unflatten(-1, (stats.shape[-2], -1))
    mean = parts.mean(-1)
    square = (parts - mean[..., None]).square().sum(-1)
    return row_error(stats.flatten(-2), torch.stack((mean, square), -1).flatten(-2))


def row_error(got: Tensor, wanted: Tensor) -> float:
    """The worst row's ‖got − wanted‖ / ‖wanted‖; inf if shapes differ or a value is not finite."""
    if got.shape != wanted.shape or not bool(got.isfinite().all()):
        return float("inf")
    off = (got.double() - wanted).norm(dim=-1)
    return (off / wanted.norm(dim=-1).clamp_min(1e-30)).max().item()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN, so that what a kernel does not write is found."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
