"""Slimmed models on a GPU: kernels checked, then timed against their floor; models against PyTorch.

    python benchmarks/gpu.py                    # results/gpu-speed.csv, gpu-kernels.csv, tables
    PYTHONPATH=. python benchmarks/gpu.py       # in a checkout that is not installed
    python benchmarks/gpu.py --minutes 3 --models deit_tiny_patch16_224

The most important is measured first and written at once; what does not fit the minutes is named.
Started again it goes on where it was, as long as commit, sources, device and torch are the same.
It does so by itself, leaving out the step, once an error makes the device useless to a process.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is imported

import argparse
import contextlib
import gc
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import gpu_kernels
import gpu_models
import gpu_tables
import torch
from gpu_clock import CLOCKS, Clock, ceilings, clocks, facts
from gpu_floor import Chip
from gpu_kernels import Task
from gpu_networks import Network, quiet
from gpu_plan import KINDS, Budget, Record, Step, batches_of, done, plan, replaced

from slimvit.backends import why_not
from slimvit.bench import format_keep
from slimvit.runtime import PRECISIONS

MODELS = [f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")]
RESULTS = Path(__file__).parent / "results"
RUNTIMES = sorted({runtime for rows in gpu_models.ROWS.values() for runtime, _ in rows})
say = partial(print, flush=True)


def main(argv: list[str] | None = None) -> int:
    start = time.perf_counter()
    args = arguments().parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            say("no CUDA GPU is available to torch: nothing is measured")
            return 1
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    session = Session(args, device, start)
    say(", ".join(f"{name} {value}" for name, value in session.facts.items() if value))
    session.run()
    session.tell()
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="no step starts that ends later")
    parser.add_argument("--models", nargs="+", default=MODELS)
    sizes = "pixels; the first is measured at all batches, the others at --large-batches"
    parser.add_argument("--image-sizes", nargs="+", type=int, default=[224, 384], help=sizes)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 256, 1024])
    parser.add_argument("--large-batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=["float16", "bfloat16"]
    )
    keep = "kept counts at the model's own size; at others the same fractions of the patches"
    parser.add_argument("--keep", default="141,141,131,121,111x7,1", help=keep)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.15, help="of each turn of a row")
    parser.add_argument("--jobs", type=int, help="processes that check; as CPUs and memory allow")
    parser.add_argument("--device", default="cuda", help="cpu: in Triton's interpreter, to try it")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the CSVs")
    # Steps as they are told: how a process that lost the device names them to the next.
    parser.add_argument("--without", action="append", default=[], help=argparse.SUPPRESS)
    return parser


def continued(command: Sequence[str], step: Step, minutes: float) -> list[str]:
    """A command line of the same, without a step; of an option given twice the last counts."""
    return [*command, "--without", str(step), "--minutes", f"{max(0.0, minutes):.2f}"]


def tidy(cuda: bool) -> None:
    """Give back what a step held; that fails where the device is lost."""
    with contextlib.suppress(Exception):
        torch.compiler.reset()  # it refuses to compile the same code for the ninth model
    gc.collect()
    if cuda:
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()


class Session:
    """One run: what is left to do, what it found, and where it is written."""

    def __init__(self, args: argparse.Namespace, device: torch.device, start: float) -> None:
        self.args, self.start = args, start
        self.clock, self.facts = Clock(device), facts(device)
        self.budget = Budget(60 * args.minutes)
        self.columns = {"speed": gpu_tables.SPEED, "kernels": gpu_tables.KERNELS}
        self.paths = {name: args.output / f"gpu-{name}.csv" for name in self.columns}
        self.rows = {n: gpu_tables.read(self.paths[n], c) for n, c in self.columns.items()}
        self.chips: dict[str, Chip] = {}
        self.checks: list[gpu_kernels.Check] = []
        self.refused: set[tuple[str, Network, str]] = set()

    def run(self) -> None:
        """Check kernels, then take the steps that fit."""
        quiet()
        args = self.args
        kinds = [kind for kind in args.kinds if self.clock.cuda or kind != "graphs"]
        asked = (args.models, args.image_sizes, args.batches, args.precisions)
        steps = plan(*asked, large_batches=args.large_batches, kinds=kinds)
        missing = [step for step in steps if not self.has(step)]
        say(f"{len(steps)} steps, {len(steps) - len(missing)} of them measured before")
        left = [step for step in missing if str(step) not in args.without]
        for step in missing:
            if step not in left:
                say(f"given up, the device was lost in it: {step}")
        if any(self.budget.allows(step, self.elapsed()) for step in left):
            self.check(left)
        skipped = []
        for step in left:
            if self.budget.allows(step, self.elapsed()):
                self.take(step)
            else:
                skipped.append(step)
        for step in skipped:
            say(f"skipped, {self.budget.expected(step):.0f} s do not fit any more: {step}")

    def has(self, step: Step) -> bool:
        """Whether the file holds a step."""
        _, masks = self.network(step).shapes()
        kept = {format_keep(masks[form].counts) for form in ("dense", "slim")}
        return done(step, self.rows[file_of(step)], self.facts, kept)

    def network(self, step: Step) -> Network:
        return Network(step.model, step.image_size, self.args.keep, str(self.clock.device))

    def check(self, steps: list[Step]) -> None:
        """Compare the kernels of all steps with float64, and of all models in float32 besides."""
        found: dict[tuple[Network, str], tuple[int, ...]] = {}
        for (model, size, precision), batches in batches_of(steps).items():
            network = Network(model, size, self.args.keep, str(self.clock.device))
            found[network, precision] = batches
        for network in list(dict.fromkeys(network for network, _ in found)):
            if network.image_size == self.args.image_sizes[0]:
                found.setdefault((network, "float32"), (min(self.args.batches),))
        tasks, reasons = [], {}
        for (network, precision), batches in found.items():
            for backend in ("triton", "cuda"):
                reason = why_not(backend, self.clock.device, PRECISIONS[precision])
                if reason is None:
                    tasks.append(Task(backend, network, precision, batches))
                    continue
                reasons[f"{backend} kernels in {precision} are not measured: {reason}"] = None
        for line in reasons:
            say(line)
        jobs = self.args.jobs or gpu_kernels.workers(self.clock)
        self.checks, refused = gpu_kernels.check_all(tasks, jobs, say)
        self.refused |= refused
        say(f"kernels checked after {self.elapsed():.0f} s")

    def take(self, step: Step) -> None:
        """Measure a step and write what it found."""
        begin = time.perf_counter()
        try:
            new = self.kernels(step) if step.kind == "kernels" else self.speeds(step)
        except Exception as error:  # one step must not end the others
            say(f"failed: {step}: {gpu_kernels.first_line(error)}")
            new = []
        name = file_of(step)
        if new:
            self.rows[name] = replaced(step, self.rows[name], new, self.facts["device"])
            gpu_tables.write(self.paths[name], self.columns[name], self.rows[name])
        tidy(self.clock.cuda)
        spent = time.perf_counter() - begin
        self.budget.spent(step, spent)
        say(f"{step}: {len(new)} rows in {spent:.0f} s, {self.elapsed():.0f} s in all")
        if not gpu_models.answers(self.clock):
            self.restart(step)

    def restart(self, step: Step) -> None:
        """Go on in a new process: in this one every call to the device fails from now on."""
        say("the device does not answer any more: a new process goes on after this step")
        with contextlib.suppress(OSError):
            for number in map(int, os.listdir("/proc/self/fd")):
                if number > 2:  # the device, left open, would keep its memory
                    with contextlib.suppress(OSError):
                        os.set_inheritable(number, False)
        minutes = self.args.minutes - self.elapsed() / 60
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execv(sys.executable, continued(command, step, minutes))

    def kernels(self, step: Step) -> list[Record]:
        network = self.network(step)
        reason = why_not("triton", self.clock.device, PRECISIONS[step.precision])
        if ("triton", network, step.precision) in self.refused:
            reason = "its kernels do not match or were not checked"
        if reason is not None:
            say(f"{step} is not timed: {reason}")
            return []
        chip = self.chip(step.precision)
        rows = gpu_kernels.measure(network, step.precision, step.batch, self.clock, chip)
        run = self.now() | self.frequencies(step.precision)
        return gpu_kernels.with_errors([run | row for row in rows], self.checks)

    def speeds(self, step: Step) -> list[Record]:
        network = self.network(step)

        def wanted(runtime: str) -> str | None:
            if runtime not in self.args.runtimes:
                return ""
            if (runtime.removeprefix("slimvit:"), network, step.precision) in self.refused:
                return "its kernels do not match or were not checked"
            return None

        options = (self.args.rounds, self.args.seconds)
        measured = gpu_models.measure(step, network, self.clock, wanted, say, *options)
        run = self.now() | self.frequencies(step.precision)
        return gpu_tables.speed_records(step, *measured, run)

    def chip(self, precision: str) -> Chip:
        """The ceilings of the device in a precision, measured in this run."""
        if precision not in self.chips:
            flops, bandwidth = ceilings(self.clock, PRECISIONS[precision])
            self.chips[precision] = Chip(self.facts["device"], flops, bandwidth)
            say(f"ceilings, {precision}: {1e-12 * flops:.0f} TFLOP/s, {1e-9 * bandwidth:.0f} GB/s")
        return self.chips[precision]

    def frequencies(self, precision: str) -> Record:
        """The clocks of the device at work; empty where they cannot be read, as rows are kept."""
        try:
            return clocks(self.clock, self.busy(precision))
        except Exception:
            return dict.fromkeys(CLOCKS, "")

    def busy(self, precision: str) -> partial[None]:
        """Matrix products that keep the device at work while its clocks are read."""
        side = 4096 if self.clock.cuda else 16
        a = torch.randn(side, side, device=self.clock.device).to(PRECISIONS[precision])
        return partial(lambda: [a @ a for _ in range(20)] and None)

    def now(self) -> Record:
        return {"date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")} | self.facts

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def tell(self) -> None:
        """Tables of what the files hold of this device."""
        device = self.facts["device"]
        speed, kernel = (
            [row for row in self.rows[name] if row["device"] == device]
            for name in ("speed", "kernels")
        )
        for head, table, rows in (
            ("Images a second, calls queued", gpu_tables.speed_table, speed),
            ("Microseconds of all launches (floor, of it)", gpu_tables.kernel_table, kernel),
            ("Acceptance", gpu_tables.acceptance, speed),
        ):
            text = table(rows) if rows else "not measured"
            say(f"\n{head}\n\n{text}")


def file_of(step: Step) -> str:
    return "kernels" if step.kind == "kernels" else "speed"


if __name__ == "__main__":
    sys.exit(main())
