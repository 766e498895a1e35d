"""Every kernel of slimmed and dense networks: checked against float64, then timed on its own."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
from gpu_calls import Launch, Verdict, judge, watched
from gpu_clock import CALLS, Clock, rotated
from gpu_floor import Chip, Kernel, kernels, total
from gpu_networks import FORMS, Network, quiet, random_images
from torch import Tensor, nn

from slimvit import accelerate
from slimvit.bench import format_keep
from slimvit.models import Spec
from slimvit.runtime import PRECISIONS

INDEX_BATCH = 2
DEADLINE = 240.0  # seconds of a task: a compiler that hangs leaves half of a run for measuring
_ENDING = 10.0  # seconds: a driver at work may hold an ended process back, and must not hold us
_MEMORY = 8 << 30  # bytes of a process that checks: an estimate of DeiT-B's at batch 1024
# To start one process collects others that ended, whose exit codes their own threads ask for.
_LOCK = threading.Lock()


class Check(NamedTuple):
    """A launch that was checked, in the forward pass of a network or with an index."""

    backend: str
    network: Network
    precision: str
    form: str
    batch: int
    kernel: str
    verdict: Verdict


class Task(NamedTuple):
    """What one process checks."""

    backend: str
    network: Network
    precision: str
    batches: tuple[int, ...]


def check_all(
    tasks: Sequence[Task], jobs: int, tell: Callable[[str], object]
) -> tuple[list[Check], set[tuple[str, Network, str]]]:
    """Check tasks side by side, which also compiles all kernels into Triton's cache.

    Returns:
        What was found, and the back ends, networks and precisions that must not be timed.
    """
    found: list[Check] = []
    refused = set()
    for task, result in zip(tasks, _answers(tasks, jobs)):
        what = f"{task.network.model} {task.network.image_size} px {task.precision}"
        what += "" if task.backend == "triton" else f" in {task.backend}"
        if isinstance(result, str):
            refused.add(task[:3])
            tell(f"{what}: kernels not checked, so not timed: {result}")
            continue
        found += result
        wrong = [check for check in result if not check.verdict.passes]
        for check in wrong:
            tell(
                f"{what}: {check.kernel} ({check.form}, batch {check.batch}) is not timed: it is "
                f"{check.verdict.error:.2g} off, PyTorch {check.verdict.own:.2g}"
            )
        if any(check.form in FORMS for check in wrong):
            refused.add(task[:3])
        worst = max(result, key=lambda c: c.verdict.error / c.verdict.limit).verdict
        tell(
            f"{what}: {len(result) - len(wrong)} of {len(result)} launches match float64; the "
            f"nearest to its limit {worst.error:.1e} of {worst.limit:.1e}"
        )
    return found, refused


def _answers(tasks: Sequence[Task], jobs: int) -> Iterable[list[Check] | str]:
    if jobs < 2 and not any(_on_gpu(task) for task in tasks):
        yield from map(answer, tasks)
        return
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        yield from pool.map(_alone, tasks)


def _alone(task: Task) -> list[Check] | str:
    """What `answer` says in a process of its own: it may hang, die or lose its device."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(answer, task, sender), daemon=True)
    try:
        with _LOCK:
            process.start()
        sender.close()  # or the pipe would outlive the process
        if not receiver.poll(DEADLINE):
            return f"it took more than {DEADLINE:.0f} s"
        return receiver.recv()
    except EOFError:
        with _LOCK:
            process.join(_ENDING)
        return f"its process ended with {process.exitcode}"
    except Exception as error:  # it did not start, or what it sent cannot be read
        return first_line(error)
    finally:
        receiver.close()
        if process.pid is not None:
            with _LOCK:
                process.kill()
                process.join(_ENDING)


def _send(work: Callable[[Task], object], task: Task, sender: Connection) -> None:
    sender.send(work(task))


def _on_gpu(task: Task) -> bool:
    return torch.device(task.network.device).type == "cuda"


def answer(task: Task) -> list[Check] | str:
    """What `check` finds, or why it could not."""
    try:
        return check(task)
    except Exception as error:  # a compiler may fail in any way
        return first_line(error)


@torch.no_grad()
def check(task: Task) -> list[Check]:
    """Check each distinct launch of the dense and slim networks, and of blocks with an index."""
    quiet()
    dtype, device = PRECISIONS[task.precision], task.network.device
    if _on_gpu(task):
        torch.cuda.set_device(device)  # launches by themselves are made on the current one
    model, shape, masks = task.network.build()
    found: dict[tuple[object, ...], Check] = {}

    def judged(form: str, batch: int) -> Callable[[Launch], None]:
        def see(launch: Launch) -> None:
            key = (form, batch, *launch.key())
            if key not in found:
                where = (*task[:3], form, batch)
                found[key] = Check(*where, launch.name, judge(launch))

        return see

    for form in FORMS:
        fast = accelerate(
            model,
            masks[form],
            backend=task.backend,
            precision=task.precision,
            batch_sizes=task.batches[:1],
        )
        for batch in task.batches:
            with watched(judged(form, batch), task.backend):
                fast(random_images(shape, batch, dtype, device))
    most = max(task.batches)
    few = min(INDEX_BATCH, most)
    for batch in sorted({few, most}):  # of many images, a block may be one launch
        with watched(judged("index", batch), task.backend):
            _indexed(fast, shape, batch, dtype, device)
    with watched(judged("index", few), task.backend):
        fast.forward_features(random_images(shape, few, dtype, device))
    return list(found.values())


def _indexed(fast: nn.Module, shape: Spec, batch: int, dtype: torch.dtype, device: str) -> None:
    """The blocks of a slim network on tokens in any order, each image keeping its own."""
    fused = fast.fused
    for block, m, n in zip(fused.blocks, fast.masks.alive, fast.masks.counts, strict=True):
        x = torch.randn(batch, m, shape.width, device=device).to(dtype)
        index = torch.stack([torch.randperm(m, device=device)[:n] for _ in range(batch)])
        block(x, index)


@torch.no_grad()
def measure(
    network: Network, precision: str, batch: int, clock: Clock, chip: Chip, seconds: float = 0.03
) -> list[dict[str, str]]:
    """Microseconds of each kernel in a forward pass, all its launches, beside its floor."""
    model, shape, masks = network.build()
    dtype = PRECISIONS[precision]
    first = random_images(shape, batch, dtype, network.device)
    images = [first, *(first.flip(0) for _ in range(1, rotated(clock, [first])))]
    records = []
    for form in FORMS:
        options = {"backend": "triton", "precision": precision, "batch_sizes": (batch,)}
        times = _times(accelerate(model, masks[form], **options), images, clock, seconds)
        size = (batch, torch.finfo(dtype).bits // 8)
        floors = kernels(shape, masks[form].counts, masks[form].alive, *size, "fused")
        shared = {
            "model": network.model,
            "image_size": str(network.image_size),
            "batch": str(batch),
            "precision": precision,
            "form": form,
            "kept": format_keep(masks[form].counts),
            "peak_tflops": f"{1e-12 * chip.flops:.1f}",
            "peak_gbytes": f"{1e-9 * chip.bandwidth:.0f}",
        }
        records += [shared | row for row in with_floors(times, floors, chip)]
    return records


def _times(
    fast: nn.Module, images: Sequence[Tensor], clock: Clock, seconds: float
) -> dict[str, tuple[int, float]]:
    """Launches and seconds of each kernel, then of the whole; launches alike are timed once."""
    seen: dict[tuple[object, ...], float] = {}
    times: dict[str, tuple[int, float]] = {}

    def see(launch: Launch) -> None:
        key = launch.key()
        if key not in seen:
            seen[key] = clock.median(sets_of(launch, clock), seconds)
        launches, time = times.get(launch.name, (0, 0.0))
        times[launch.name] = (launches + 1, time + seen[key])

    with watched(see):
        tokens = fast.fused(images[0])
    head = [lambda t=t: fast.network.forward_head(t) for t in (tokens, tokens.clone())]
    launches = 1 + sum(count for count, _ in times.values())
    times["head"] = (1, clock.median(head, seconds))
    whole = clock.median([lambda i=i: fast(i) for i in images], 3 * seconds)
    return times | {"whole": (launches, whole)}


def sets_of(launch: Launch, clock: Clock) -> list[Launch]:
    """The launch on as many sets of inputs as the cache does not hold."""
    count = rotated(clock, launch.tensors(), CALLS)
    return [launch, *(launch.copy() for _ in range(1, count))]


def with_floors(
    times: dict[str, tuple[int, float]], floors: Sequence[Kernel], chip: Chip
) -> list[dict[str, str]]:
    """A row for each kernel: its time, and its floor where the plan knows such a kernel."""
    by_name = {kernel.name: kernel for kernel in floors}
    found = []
    for name, (launches, time) in times.items():
        row = {"kernel": name, "launches": str(launches), "microseconds": f"{1e6 * time:.2f}"}
        kernel = total(floors) if name == "whole" else by_name.get(name)
        if kernel is not None:
            parts = floors if name == "whole" else [kernel]
            floor = sum(map(chip.seconds, parts))
            row |= {
                "gflop": f"{1e-9 * kernel.flops:.3f}",
                "mbytes": f"{1e-6 * kernel.bytes:.3f}",
                "floor_microseconds": f"{1e6 * floor:.2f}",
                "of_floor": f"{floor / time:.4f}",
                "bound": chip.bound(kernel),
            }
        found.append(row)
    return found


def with_errors(rows: Iterable[dict[str, str]], found: Iterable[Check]) -> list[dict[str, str]]:
    """Rows with the worst error of their kernel, and PyTorch's own beside it."""
    worst: dict[tuple[str, ...], Verdict] = {}
    for item in found:
        size = str(item.network.image_size)
        key = (item.network.model, size, str(item.batch), item.precision, item.form, item.kernel)
        if item.backend != "triton":
            continue
        if key not in worst or item.verdict.error > worst[key].error:
            worst[key] = item.verdict
    result = []
    for row in rows:
        names = ("model", "image_size", "batch", "precision", "form", "kernel")
        verdict = worst.get(tuple(row[name] for name in names))
        errors = (verdict.error, verdict.own) if verdict else ()
        result.append(row | {n: f"{e:.1e}" for n, e in zip(("error", "torch_error"), errors)})
    return result


def workers(clock: Clock) -> int:
    """How many processes work side by side: each has a core and room on the GPU; on a CPU one."""
    if not clock.cuda:
        return 1
    room = torch.cuda.mem_get_info(clock.device)[0] // _MEMORY
    return max(1, min(12, (os.cpu_count() or 1) - 2, room))


def first_line(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
