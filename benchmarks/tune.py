"""Measure tile sizes on the GPU here and write the best into the table of configurations.

    python benchmarks/tune.py                          # rewrites kernels/configs.json
    python benchmarks/tune.py --dry-run --stages mlp   # tells what it would change

Each stage is launched as the models launch it; a candidate is compared with float64 before it is
timed, and one that does not compile, does not fit or answers wrong is passed over.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_calls import Launch, judge, watched
from gpu_clock import Clock, ceilings
from gpu_kernels import first_line, sets_of, workers
from gpu_networks import FORMS, Network, quiet, random_images
from tune_compile import compile_all, job
from tune_table import (
    UNBOUNDED,
    Choice,
    Config,
    Key,
    bucket,
    buckets,
    candidates,
    choose,
    merged,
    text_of,
)

from slimvit import accelerate
from slimvit.backends.fused import kernel_set
from slimvit.errors import SlimvitError
from slimvit.files import atomic_write
from slimvit.runtime import PRECISIONS

MODELS = [f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")]
# The most time of a forward pass first.
STAGES = ("fc1", "fc2", "mlp", "qkv", "proj", "attention", "embedding", "last_attention", "linear")
MOST_SHAPES = 3  # of a key, the most frequent: others are much like them
say = partial(print, flush=True)


def main(argv: list[str] | None = None) -> int:
    start = time.perf_counter()
    args = arguments().parse_args(argv)
    device, configs = torch.device(args.device), kernel_set("triton").configs
    table = args.table or configs.TABLE
    if device.type == "cuda" and not torch.cuda.is_available():
        say("no CUDA GPU is available to torch: nothing is measured")
        return 1
    if device.type != "cuda" and not (args.dry_run or args.table):
        say("what the interpreter takes says nothing of a GPU: give --dry-run or --table")
        return 2
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # launches by themselves are made on the current one
    quiet()
    clock = Clock(device)
    before = table_of(table, configs)
    with using(table, configs):
        keys = shapes(args, device, configs, before)
        found = tuned(keys, args, clock, configs, 60 * args.minutes - (time.perf_counter() - start))
    after = merged(before, found)
    for key, (config, old, gain) in found.items():
        if config != old:
            say(f"{told(key)}: {list(old)} -> {list(config)}, {gain:.2f} times as fast")
    if after == before:
        say("nothing is faster than the table")
        return 0
    validate(text_of(after), found, configs, before)
    if args.dry_run:
        say(f"{table} stays as it is: --dry-run")
        return 0
    atomic_write(table, text_of(after).encode())
    say(f"{table}: {len(after) - len(before)} entries more, {len(after)} in all")
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 1, 16])
    parser.add_argument("--keep", default="141,141,131,121,111x7,1")
    parser.add_argument("--precision", choices=PRECISIONS, default="float16")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--minutes", type=float, default=8.0, help="then what was found is written")
    parser.add_argument("--most", type=int, default=24, help="candidates of a stage and size")
    parser.add_argument("--jobs", type=int, help="processes that compile; as CPUs and memory allow")
    parser.add_argument("--table", type=Path, help="another file than the kernels' own")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--device", default="cuda", help="cpu: in Triton's interpreter, to try it")
    return parser


@torch.no_grad()
def shapes(
    args: argparse.Namespace, device: torch.device, configs: Any, entries: Sequence[dict]
) -> dict[Key, list[tuple[Launch, int]]]:
    """The launches of the models by what the table tells apart, with how often each occurs."""
    found: dict[Key, dict[tuple[object, ...], list[Any]]] = {}
    dtype = PRECISIONS[args.precision]
    arch, itemsize = (
        configs.family(kernel_set("triton").architecture(device)),
        torch.finfo(dtype).bits // 8,
    )

    def see(launch: Launch) -> None:
        if launch.stage not in args.stages:
            return
        width, rows = launch.table_key()
        bound = bucket(buckets(entries, launch.stage, arch, itemsize), rows)
        alike = found.setdefault(Key(launch.stage, arch, itemsize, width, bound), {})
        if launch.key() in alike or len(alike) < MOST_SHAPES:
            alike.setdefault(launch.key(), [launch, 0])[1] += 1

    for name in args.models:
        network = Network(name, args.image_size, args.keep, str(device))
        model, shape, masks = network.build()
        for form in reversed(FORMS):
            fast = accelerate(
                model,
                masks[form],
                backend="triton",
                precision=args.precision,
                batch_sizes=args.batches[:1],
            )
            for batch in args.batches:
                with watched(see):
                    fast(random_images(shape, batch, dtype, str(device)))
    order = sorted(found, key=lambda key: (key.rows is not None, STAGES.index(key.stage)))
    return {key: [tuple(pair) for pair in found[key].values()] for key in order}


def tuned(
    keys: dict[Key, list[tuple[Launch, int]]],
    args: argparse.Namespace,
    clock: Clock,
    configs: Any,
    seconds: float,
) -> dict[Key, Choice]:
    """The choice for each key; the present configuration where no time was left to measure."""
    end = time.perf_counter() + seconds
    present = {
        key: astuple(configs.lookup(*key[:4], UNBOUNDED if key.rows is None else key.rows))
        for key in keys
    }
    limit = configs.SHARED_MEMORY
    tried = {
        key: candidates(key, current, limit[key.arch])[: args.most]
        for key, current in present.items()
    }
    jobs = [
        job(launch, c)
        for key, launches in keys.items()
        for launch, _ in launches[: None if key.stage == "attention" else 1]  # a shape, a kernel
        for c in tried[key]
    ]
    processes = args.jobs or workers(clock)
    if processes > 1 and clock.cuda:
        begin = time.perf_counter()
        compile_all(jobs, processes, seconds / 2)
        say(f"{len(jobs)} candidates compiled in {time.perf_counter() - begin:.0f} s")
    ceilings(clock, PRECISIONS[args.precision])  # so that the device's clocks have risen
    found: dict[Key, Choice] = {}
    for key, launches in keys.items():
        current = present[key]
        found[key] = Choice(current, current, 1.0)
        if time.perf_counter() > end:
            say(f"{told(key)}: not measured, no time is left")
            continue
        times = {
            c: [seconds_of(launch, configs.Config(*c), clock) for launch, _ in launches]
            for c in tried[key]
        }
        found[key] = choose(times, [count for _, count in launches], current)
        failed = sum(None in ts for ts in times.values())
        total = len(times)
        say(f"{told(key)}: {total - failed} of {total} work, gain {found[key].gain:.2f}")
    return found


@torch.no_grad()
def seconds_of(launch: Launch, config: Any, clock: Clock) -> float | None:
    """Seconds of a launch with a configuration, or None if it does not work or answers wrong."""
    try:
        if not judge(launch, config=config).passes:
            return None
        sets = sets_of(launch, clock)
        return clock.median([partial(each, config=config) for each in sets], 0.01)
    except Exception as error:  # compilers and launches may fail in any way
        if "CUDA error" in str(error):
            say(f"  {config}: {first_line(error)}")
        return None


def validate(
    text: str, found: dict[Key, Choice], configs: Any, before: Sequence[dict[str, Any]]
) -> None:
    """Refuse a table that does not answer as was chosen, or that answers otherwise for others.

    Raises:
        SlimvitError: it is wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        old, new = Path(folder) / "old.json", Path(folder) / "configs.json"
        old.write_text(text_of(before))
        new.write_text(text)
        stages = {key.stage for key in found}
        probes = list(others(before, found))
        with using(old, configs):
            wanted = [answer(configs, probe) for probe in probes]
        with using(new, configs):
            got = [answer(configs, probe) for probe in probes]
            for key, choice in found.items():
                config = answer(configs, (*key[:4], UNBOUNDED if key.rows is None else key.rows))
                if config != choice.config:
                    raise SlimvitError(f"the new table has {config} for {told(key)}: not written")
    for probe, a, b in zip(probes, wanted, got, strict=True):
        if a != b:
            raise SlimvitError(f"the new table changes {probe}, not in {sorted(stages)}: {a}, {b}")


def others(
    entries: Sequence[dict[str, Any]], found: dict[Key, Choice]
) -> Iterator[tuple[str, int, int, int, int]]:
    """Questions that a tuned table must answer as before: other stages, architectures, sizes."""
    tuned_for = {key[:3] for key in found}
    for stage in sorted({name for entry in entries for name in entry["kernel"]}):
        for arch in (80, 86, 90, 100):
            for itemsize in (2, 4):
                if (stage, arch, itemsize) not in tuned_for:
                    for width in (16, 64, 192, 256, 384, 768, 3072):
                        for rows in (1, 32, 33, 512, 513, 4096, UNBOUNDED):
                            yield stage, arch, itemsize, width, rows


def answer(configs: Any, probe: tuple[str, int, int, int, int]) -> Config | None:
    try:
        return astuple(configs.lookup(*probe))
    except LookupError:
        return None


def astuple(config: Any) -> Config:
    return config.block_m, config.block_n, config.block_k, config.warps, config.stages


@contextmanager
def using(table: Path, configs: Any) -> Iterator[None]:
    """Let the kernels look things up in another file."""
    original = configs.TABLE
    configs.TABLE = table
    try:
        configs.entries.cache_clear()
        configs.lookup.cache_clear()
        yield
    finally:
        configs.TABLE = original
        configs.entries.cache_clear()
        configs.lookup.cache_clear()


def table_of(table: Path, configs: Any) -> list[dict[str, Any]]:
    with using(table, configs):
        return configs.entries()


def told(key: Key) -> str:
    rows = "any rows" if key.rows is None else f"rows <= {key.rows}"
    return f"{key.stage}, sm_{key.arch}, {key.itemsize} bytes, width <= {key.width}, {rows}"


if __name__ == "__main__":
    sys.exit(main())
