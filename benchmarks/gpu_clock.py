"""Time on a device, its measured ceilings, and what it is."""

from __future__ import annotations

import importlib.metadata
import subprocess
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import slimvit
from slimvit.bench import commit, device_name

Call = Callable[[], object]
ROOT = Path(__file__).parent.parent
FACTS = ("device", "driver", "torch", "triton", "timm", "slimvit", "commit", "source")
CLOCKS = ("sm_mhz", "memory_mhz")
CALLS = 32  # in one graph of short kernels


class Clock:
    """Seconds that a device takes: by CUDA events on a GPU, by the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def queued(self, calls: Sequence[Call], times: int) -> float:
        """Seconds for all of `calls` in turn, `times` over, nothing waited for in between."""
        self.wait()
        start = self._mark()
        for _ in range(times):
            for call in calls:
                call()
        return self._since(start)

    def waited(self, call: Call) -> float:
        """Seconds from a call to its answer, as its caller sees them."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def median(self, calls: Sequence[Call], seconds: float) -> float:
        """Median seconds of a call where launching costs nothing: calls take turns in a CUDA graph.

        Args:
            calls: the same work on several sets of inputs, so that no cache holds them all.
            seconds: for which the graph is replayed, five times at least. A CPU calls once.
        """
        self.queued(calls, 1)  # compiles and warms up
        if not self.cuda:
            return self.queued(calls, 1) / len(calls)
        loops = max(1, CALLS // len(calls)) if self.queued(calls, 1) < 5e-3 else 1
        run = self._graph(calls, loops)
        self.queued([run], 2)
        times = max(5, min(1000, int(seconds / max(self.queued([run], 2), 1e-7))))
        return median(self._behind(run) for _ in range(times)) / (loops * len(calls))

    def _behind(self, run: Call) -> float:
        """Seconds that a GPU takes for a call that is launched while it is busy with another."""
        self.wait()
        run()
        start = self._mark()
        run()
        return self._since(start)

    def _graph(self, calls: Sequence[Call], loops: int) -> Call:
        with torch.cuda.device(self.device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(loops):
                    for call in calls:
                        call()
        return graph.replay

    def _mark(self) -> torch.cuda.Event | float:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _since(self, start: torch.cuda.Event | float) -> float:
        if isinstance(start, float):
            return time.perf_counter() - start
        end = self._mark()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)


def ceilings(clock: Clock, dtype: torch.dtype, seconds: float = 0.3) -> tuple[float, float]:
    """Flops a second of a large matrix product in `dtype`; bytes a second, read and written.

    The median of repeated products and copies of random values; several, so that none is cached.
    """
    side, length = (8192, 1 << 28) if clock.cuda else (128, 1 << 16)
    a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in "ab")
    product = torch.empty_like(a)
    flops = 2 * side**3 / clock.median([lambda: torch.mm(a, b, out=product)], seconds)
    source = torch.randn(length, device=clock.device)
    copies = [torch.empty_like(source) for _ in range(2)]
    calls = [lambda copy=copy: copy.copy_(source) for copy in copies]
    return flops, 2 * 4 * length / clock.median(calls, seconds)


def rotated(clock: Clock, tensors: Sequence[Tensor], most: int = 8) -> int:
    """How many sets of such inputs make twice what the L2 cache holds; two to `most` on a GPU."""
    if not clock.cuda:
        return 1
    cache = torch.cuda.get_device_properties(clock.device).L2_cache_size
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return max(2, min(most, -(-2 * cache // max(size, 1))))


def facts(device: torch.device) -> dict[str, str]:
    """Device, driver, versions, commit, and a digest of the sources that are measured."""
    found = {"device": device_name(device), "driver": smi(device, "driver_version")[0]}
    for package in ("torch", "triton", "timm"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    found["torch"] = torch.__version__
    return found | {"slimvit": slimvit.__version__, "commit": commit(), "source": source()}


def source(root: Path = ROOT) -> str:
    """Digest of the package, all kernels and their table: what a speed was measured of."""
    digest = sha256()
    patterns = ("slimvit/**/*.py", "kernels/*.py", "kernels/*.json", "csrc/**/*.*")
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def smi(device: torch.device, *fields: str) -> list[str]:
    """What nvidia-smi reads of the device, or empty strings; it only ever reads."""
    return finish_smi(start_smi(device, *fields), device, len(fields))


def start_smi(device: torch.device, *fields: str) -> subprocess.Popen[str] | None:
    if device.type != "cuda":
        return None
    query = [f"--query-gpu=uuid,{','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.Popen(
            ["nvidia-smi", *query], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        return None


def finish_smi(
    process: subprocess.Popen[str] | None, device: torch.device, fields: int
) -> list[str]:
    if process is None:
        return [""] * fields
    try:
        out, _ = process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", "none"))
    return of_device(out, uuid, fields)


def of_device(text: str, uuid: str, fields: int) -> list[str]:
    """The device's line of nvidia-smi, without its UUID: the only one, or the one that bears it."""
    lines = [[value.strip() for value in line.split(",")] for line in text.strip().splitlines()]
    lines = [line for line in lines if len(line) == fields + 1]
    if len(lines) > 1:
        lines = [line for line in lines if uuid in line[0]]
    return lines[0][1:] if lines else [""] * fields


def clocks(clock: Clock, busy: Call) -> dict[str, str]:
    """SM and memory clocks, in MHz, read while the device is kept `busy`."""
    process = start_smi(clock.device, "clocks.sm", "clocks.mem")
    end = time.perf_counter() + 3
    while process is not None and process.poll() is None and time.perf_counter() < end:
        busy()
        clock.wait()
    return dict(zip(CLOCKS, finish_smi(process, clock.device, len(CLOCKS)), strict=True))
