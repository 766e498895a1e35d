"""Whole models on a GPU: every runtime made ready, compared with float32, and timed in rounds."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from gpu_clock import Clock, rotated
from gpu_kernels import first_line
from gpu_networks import Network, random_images
from gpu_plan import Step
from torch import Tensor, nn

from slimvit import Masks, accelerate, apply_masks
from slimvit.backends import why_not
from slimvit.bench import TOLERANCES
from slimvit.export import relative_error
from slimvit.models import Spec
from slimvit.runtime import PRECISIONS
from slimvit.runtime.graphs import Graph

TIMES_OWN = 2.0
CHECKED_IMAGES = 32
_SINGLE_CALLS = 50
Run = Callable[[Tensor], Tensor]
_OURS = tuple(
    (f"slimvit:{name}", form) for name in ("torch", "triton", "cuda") for form in ("dense", "slim")
)
# Runtimes and forms of each kind of step, in the order of its rows.
ROWS = {
    "rows": (("torch", "dense"), ("torch.compile", "dense"), *_OURS),
    "graphs": (("torch", "dense"), *_OURS),
    "max-autotune": (("torch.compile:max-autotune", "dense"), *_OURS[2:]),
}


@dataclass
class Row:
    """A runtime with one model in it, and what was measured of it.

    Attributes:
        runtime: "torch", "torch.compile", "torch.compile:max-autotune" or "slimvit:<back end>".
        form: "dense" or "slim".
        graphs: whether its calls replay a CUDA graph.
        run: from images to logits.
        error: relative error of its logits to float32 PyTorch (to float64 if it is float32 itself).
        torch_error: that of eager PyTorch in the same precision.
        peak_mib: device memory of a call, weights and images included; None where not measured.
        rates: images a second of each round, calls queued one behind the other.
        latencies: seconds from a call to its answer, the median of each round.
    """

    runtime: str
    form: str
    graphs: bool
    run: Run
    error: float
    torch_error: float
    peak_mib: float | None
    rates: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)


class Work:
    """A network at one batch and precision: the forms that runtimes take, images, references."""

    def __init__(self, network: Network, batch: int, precision: str, clock: Clock) -> None:
        self.model, self.shape, self.masks = network.build()
        self.batch, self.precision, self.clock = batch, precision, clock
        self.dtype = PRECISIONS[precision]
        first = self._random()
        count = rotated(clock, [first])
        self.images = [first, *(self._random() for _ in range(1, count))]
        exact = torch.float64 if self.dtype == torch.float32 else torch.float32
        self.references = {form: self._logits(form, exact) for form in self.masks}
        self.torch_errors = {
            form: relative_error(self._logits(form, self.dtype), self.references[form])
            for form in self.masks
        }

    def plain(self, form: str) -> nn.Module:
        """The network in plain PyTorch, float32."""
        slim = form == "slim"
        return apply_masks(self.model, self.masks[form]) if slim else copy.deepcopy(self.model)

    def _random(self) -> Tensor:
        return random_images(self.shape, self.batch, self.dtype, str(self.clock.device))

    def _logits(self, form: str, dtype: torch.dtype) -> Tensor:
        with torch.inference_mode():
            net = self.plain(form).eval().to(dtype)
            return net(self.images[0][:CHECKED_IMAGES].to(dtype)).double()


def measure(
    step: Step,
    network: Network,
    clock: Clock,
    wanted: Callable[[str], str | None],
    tell: Callable[[str], object],
    rounds: int,
    seconds: float,
) -> tuple[list[Row], Spec, dict[str, Masks]]:
    """Time every row of a step that works and answers right.

    Args:
        step: what to measure.
        network: the model at the step's image size.
        clock: of the device.
        wanted: why a runtime is not to be measured, or None; "" for a reason nobody asked for.
        tell: is told of every row that is left out, and why.
        rounds: turns of each row.
        seconds: of each turn.

    Returns:
        Rows, the model's shape and its masks.
    """
    work = Work(network, step.batch, step.precision, clock)
    rows = timed(prepared(step.kind, work, wanted, tell), work, tell, rounds, seconds)
    return rows, work.shape, work.masks


def prepared(
    kind: str, work: Work, wanted: Callable[[str], str | None], tell: Callable[[str], object]
) -> list[Row]:
    """The rows of a kind of step that work and answer right; none once the device is lost."""
    rows: list[Row] = []
    for runtime, form in ROWS[kind]:
        name = runtime.removeprefix("slimvit:")
        reason = wanted(runtime)
        if reason is None and name != runtime:
            reason = why_not(name, work.clock.device, work.dtype)
            if reason is not None and name == "cuda":
                continue  # it need not be built, and why it is not has been said
        if reason is None:
            row, reason = attempt(runtime, form, kind == "graphs", work)
            if reason is None:
                rows.append(row)
                continue
        if reason:
            tell(f"  {runtime} {form} is not timed: {reason}")
        if not answers(work.clock):
            tell("  no other row is timed: the device does not answer any more")
            return []
    return rows


def timed(
    rows: Sequence[Row], work: Work, tell: Callable[[str], object], rounds: int, seconds: float
) -> list[Row]:
    """Rows after their rounds, all the same number; one that fails is named and left out."""
    left = list(rows)
    with torch.inference_mode():
        for number in range(rounds):
            for row in list(left if number % 2 == 0 else left[::-1]):
                try:
                    _turn(row, work, seconds)
                except Exception as error:  # the rounds of the others are worth keeping
                    tell(f"  {row.runtime} {row.form} is not timed: {first_line(error)}")
                    left = [other for other in left if other is not row]
                    if not answers(work.clock):
                        return _complete(left, max(1, number), tell)
    return left


def _complete(rows: Sequence[Row], rounds: int, tell: Callable[[str], object]) -> list[Row]:
    """Rows that have so many rounds, cut to them, where the device was lost in the next."""
    kept = []
    for row in rows:
        if len(row.rates) < rounds:
            tell(f"  {row.runtime} {row.form} is not timed: the device does not answer any more")
            continue
        row.rates, row.latencies = row.rates[:rounds], row.latencies[:rounds]
        kept.append(row)
    return kept


def answers(clock: Clock) -> bool:
    """Whether the device still works in this process: after an illegal address nothing does."""
    try:
        clock.wait()
    except Exception:
        return False
    return True


def attempt(runtime: str, form: str, graphs: bool, work: Work) -> tuple[Row | None, str | None]:
    """A row that is ready to be timed, or the reason why there is none."""
    try:
        row = ready(runtime, form, graphs, work)
    except Exception as error:  # compilers and memory may fail in any way
        return None, first_line(error)
    return row, refusal(row.error, row.torch_error, work.precision)


def refusal(error: float, torch_error: float, precision: str) -> str | None:
    """Why a row must not be timed, or None: at most twice eager PyTorch's error, and that sane."""
    eps = torch.finfo(PRECISIONS[precision]).eps
    if not torch_error <= TOLERANCES[precision]:
        return f"eager PyTorch itself is {torch_error:.2g} off float32"
    if not error <= TIMES_OWN * torch_error + eps:
        return f"its logits are {error:.2g} off float32, eager PyTorch's {torch_error:.2g}"
    return None


def ready(runtime: str, form: str, graphs: bool, work: Work) -> Row:
    """A row that has run once."""
    clock, images = work.clock, work.images[0]
    with torch.inference_mode():
        if runtime.startswith("slimvit:"):
            run, peak = _slimvit(runtime, form, graphs, work)
        else:
            run, peak = _foreign(runtime, form, graphs, work)
        for _ in range(3 if clock.cuda else 1):  # CUDA graphs of torch.compile: from the third on
            logits = run(images)
        clock.wait()
        error = relative_error(logits[:CHECKED_IMAGES].double(), work.references[form])
    graphs = graphs or runtime.endswith("max-autotune")
    return Row(runtime, form, graphs, run, error, work.torch_errors[form], peak)


def _slimvit(runtime: str, form: str, graphs: bool, work: Work) -> tuple[Run, float | None]:
    with torch.inference_mode(False), torch.no_grad():
        fast = accelerate(
            work.model,
            work.masks[form],
            backend=runtime.removeprefix("slimvit:"),
            precision=work.precision,
            batch_sizes=(work.batch,),
        )
    hold = functools.partial(fast.warm_up, work.batch, cuda_graph=True)
    make = hold if graphs else functools.partial(fast, work.images[0])
    return fast, _peak(make, fast, work)


def _foreign(runtime: str, form: str, graphs: bool, work: Work) -> tuple[Run, float | None]:
    with torch.inference_mode(False), torch.no_grad():
        net = work.plain(form).eval().requires_grad_(False).to(work.dtype)
    images = work.images[0]
    if runtime == "torch":
        net(images)
        if not graphs:
            return net, _peak(functools.partial(net, images), net, work)
        held: list[Graph] = []
        peak = _peak(lambda: held.append(Graph(net, images)), net, work)
        return held[0], peak
    mode = runtime.partition(":")[2] or "default"
    compiled = torch.compile(net, dynamic=False, fullgraph=True, mode=mode)
    compiled(images)
    if mode == "default":
        return compiled, _peak(functools.partial(compiled, images), net, work)
    return compiled, None  # the pool of its CUDA graphs is not counted like memory of a call


def _peak(make: Callable[[], object], net: nn.Module, work: Work) -> float | None:
    """MiB that a call (or the capture of one) needs at most, its weights and images included."""
    if not work.clock.cuda:
        return None
    work.clock.wait()
    device = work.clock.device
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    make()
    work.clock.wait()
    held = [*net.parameters(), *net.buffers(), work.images[0]]
    size = sum(tensor.numel() * tensor.element_size() for tensor in held)
    return (torch.cuda.max_memory_allocated(device) - before + size) / 2**20


def _turn(row: Row, work: Work, seconds: float) -> None:
    """One untimed call; calls queued for half the turn; then single calls for the other half."""
    calls = [functools.partial(row.run, images) for images in work.images]
    once = work.clock.waited(calls[0])
    if work.clock.cuda:  # in a queue a call takes less than one that is waited for
        trial = max(1, min(20, int(seconds / 4 / once)))
        once = work.clock.queued(calls[:1], trial) / trial
    times = max(1, int(seconds / 2 / max(once * len(calls), 1e-7)))
    elapsed = work.clock.queued(calls, times)
    singles = [] if work.clock.cuda else [once]
    end = time.perf_counter() + seconds / 2
    while not singles or (len(singles) < _SINGLE_CALLS and time.perf_counter() < end):
        singles.append(work.clock.waited(calls[len(singles) % len(calls)]))
    row.rates.append(work.batch * times * len(calls) / elapsed)  # both or, if a call fails, neither
    row.latencies.append(median(singles))


def paired(fast: Sequence[float], slow: Sequence[float]) -> float:
    """Median over rounds of fast / slow."""
    return median(f / s for f, s in zip(fast, slow, strict=True))
