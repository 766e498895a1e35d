"""The launches of a forward pass, as the back end makes them: watched, repeated, and checked.

    with watched(lambda launch: print(launch.name, judge(launch))):
        fast(images)

Nothing here knows how a block is put together: kernels are replaced by watchers of their calls.
References are the kernels' formulas in plain PyTorch, in whatever dtype is asked for.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
        return Launch(self.name, self.stage, self.function, _mapped(self.arguments, Tensor.clone))

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
    """Call `see` with every launch of a back end's kernels, after it was made."""
    module, last = kernel_set(backend), False

    def watcher(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal last
            bound = inspect.signature(function).bind(*args, **kwargs)
            bound.apply_defaults()
            short, stage, last = names(name, bound.arguments, last)
            result = function(*args, **kwargs)
            if result is not None:  # a whole block is left to the other kernels where it is None
                see(Launch(short, stage, function, dict(bound.arguments)))
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
    wanted = reference(launch, some, torch.float64)
    own = reference(launch, some, dtype)
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


def reference(launch: Launch, arguments: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What a kernel computes, in plain PyTorch in `dtype`."""
    plain = _mapped(arguments, lambda t: t.to(dtype) if t.is_floating_point() else t)
    return tuple(REFERENCES[launch.function.__name__](**plain))


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


def _mapped(arguments: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            items = [one(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return change(value) if isinstance(value, Tensor) else value

    return {name: one(value) for name, value in arguments.items()}


def _norm(x: Tensor, eps: float, spread: Tensor | None = None) -> Tensor:
    if spread is None:
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    return (x - x.mean(-1, keepdim=True)) * _rstd(x, eps, spread)


def _rstd(x: Tensor, eps: float, spread: Tensor) -> Tensor:
    return (x.var(-1, correction=0, keepdim=True) + spread[..., None] + eps).rsqrt()


def _taken(x: Tensor, index: Tensor | None, n: int) -> Tensor:
    if index is None:
        return x[:, :n]
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _activate(x: Tensor, name: str) -> Tensor:
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if name == "none":
        return x
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def _mean_activation(u: Tensor, s: Tensor, name: str) -> Tensor:
    """Of values about u whose variance is s."""
    if name == "none":
        return u
    r = (1 + s).rsqrt()
    z = u * r
    density = torch.exp(-0.5 * z.square()) * (2 * math.pi) ** -0.5
    return (_activate(z, name) + (1 - r.square()) * density) / r


def _embedding(images, weight, table, order, prefix, **_) -> list[Tensor]:
    patches = F.conv2d(images, weight, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    tokens = F.pad(patches, (0, 0, prefix, 0))
    return [tokens[:, order] + table]


def _qkv(x, weight, bias, n, inner, eps, index, **_) -> list[Tensor]:
    y = _norm(x, eps)
    kv = F.linear(y, weight[inner:], bias[inner:])
    return [F.linear(_taken(y, index, n), weight[:inner], bias[:inner]), kv]


def _linear(
    x, weight, bias, n, groups, stats, eps, activation, residual, index, spread, squares, **_
) -> list[Tensor]:
    n = x.shape[1] if n is None else n
    rows = index if residual is None else None
    x = _taken(x, rows, n)
    spread = None if spread is None else _taken(spread[..., None], rows, n)[..., 0]
    y = x if stats is None else _norm(x, eps, spread)
    y = y.unflatten(2, (groups, -1)).transpose(1, 2)  # [B, groups, n, K]
    y = y @ weight.unflatten(0, (groups, -1)).transpose(1, 2)
    y = y.transpose(1, 2).flatten(2)
    y = y if bias is None else y + bias
    if spread is None:
        y = _activate(y, activation)
    else:
        s = spread[..., None] * _rstd(x, eps, spread).square() * squares
        y = _mean_activation(y, s, activation)
    return [y if residual is None else y + _taken(residual, index, n)]


def _attention(q, kv, heads, key_bias, extra, **_) -> list[Tensor]:
    if key_bias is not None or extra is not None:
        raise NotImplementedError("biased keys and zero rows are not measured")
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, *kv.chunk(2, dim=2)))
    return [F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)]


def _last_attention(x, u, head_dim, eps, key_bias, zero_bias, **_) -> list[Tensor]:
    if key_bias is not None or zero_bias is not None:
        raise NotImplementedError("biased keys and zero rows are not measured")
    y = _norm(x, eps)
    return [(u @ y.transpose(1, 2) * head_dim**-0.5).softmax(-1) @ y]


def _mlp(attended, x, proj, fc1, fc2, eps, activation, index, spread, squares, **_) -> list[Tensor]:
    y = _taken(x, index, attended.shape[1]) + F.linear(attended, *proj)
    u = F.linear(_norm(y, eps, spread), *fc1)
    if spread is None:
        return [y + F.linear(_activate(u, activation), *fc2)]
    s = spread[..., None] * _rstd(y, eps, spread).square() * squares
    return [y + F.linear(_mean_activation(u, s, activation), *fc2)]


def _block(x, part, n, heads, activation, eps, key_bias, zero_rows, index, out) -> list[Tensor]:
    if key_bias is not None or zero_rows or out is not None:
        raise NotImplementedError("biased keys, zero rows and idle tokens are not measured")
    q, kv = _qkv(x, part.qkv, part.qkv_bias, n, part.proj.shape[1], eps[0], index)
    (attended,) = _attention(q, kv, heads, None, None)
    weights = part[3:5], part[5:7], part[8:10]
    return _mlp(attended, x, *weights, eps[1], activation, index, None, None)


def _scatter(x, index, length) -> list[Tensor]:
    index = index.expand(x.shape[0], -1)[..., None].expand_as(x)
    return [x.new_zeros(x.shape[0], length, x.shape[2]).scatter(1, index, x)]


REFERENCES: dict[str, Callable[..., list[Tensor]]] = {
    "patch_embedding": _embedding,
    "slim_qkv": _qkv,
    "slim_linear": _linear,
    "slim_attention": _attention,
    "last_attention": _last_attention,
    "slim_mlp": _mlp,
    "whole_block": _block,
    "scatter_tokens": _scatter,
}
