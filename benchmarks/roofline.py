"""Where the time of the C++ kernels goes: each part of a forward pass against the measured peak.

    python benchmarks/roofline.py                       # results/roofline.csv and a table

One thread, so that nothing waits. A part that multiplies matrices has the time that the processor
would need at its peak, and the share of that in the time it takes; the others have time alone.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is imported

import argparse
import csv
import io
import time
from pathlib import Path

import torch

from slimvit import Masks, _extensions, accelerate, models
from slimvit.backends import cpu
from slimvit.bench import commit, device_name, format_keep, parse_keep
from slimvit.export import sample_images
from slimvit.files import atomic_write
from slimvit.models import Spec
from slimvit.runtime import PRECISIONS

MODELS = [f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")]
RESULTS = Path(__file__).parent / "results"
COLUMNS = ("model", "device", "precision", "batch", "kept", "part", "microseconds", "share")
COLUMNS += ("ideal", "of_peak", "peak_gflops", "commit")
_cpu = _extensions.load("_cpu")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--keep", default="141,141,131,121,111x7,1")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS / "roofline.csv")
    args = parser.parse_args(argv)
    if _cpu is None:
        raise SystemExit(_extensions.why_not("_cpu"))
    torch.set_num_threads(1)
    records = []
    for name in args.models:
        for precision in args.precisions:
            rows = measure(name, precision, args)
            print(f"\n{name}, {precision}, batch {args.batch}, one thread\n{table(rows)}")
            records += rows
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    atomic_write(args.output, text.getvalue().encode())


def measure(name: str, precision: str, args: argparse.Namespace) -> list[dict[str, str]]:
    """Microseconds of one image by part in the fastest round, the whole first."""
    torch.manual_seed(0)
    model = models.create(name)
    shape = models.spec(model)
    masks = Masks.from_counts(parse_keep(args.keep), shape.grid, shape.prefix)
    fast = accelerate(model, masks, backend="cpu", precision=precision)
    images = sample_images((shape.in_chans, *shape.image_size), args.batch)
    fast(images)
    times = min((profile(fast, images) for _ in range(args.rounds)), key=lambda part: part["whole"])
    peak = max(cpu.peak(PRECISIONS[precision]) for _ in range(5))
    macs = parts_macs(shape, masks)
    macs["whole"] = sum(macs.values())
    records = []
    for part, seconds in times.items():
        ideal = 2 * macs[part] / peak if part in macs else None
        record = {
            "model": name,
            "device": device_name(torch.device("cpu")),
            "precision": precision,
            "batch": args.batch,
            "kept": format_keep(masks.counts),
            "part": part,
            "microseconds": f"{1e6 * seconds:.1f}",
            "share": f"{seconds / times['whole']:.4f}",
            "ideal": "" if ideal is None else f"{1e6 * ideal:.1f}",
            "of_peak": "" if ideal is None else f"{ideal / seconds:.4f}",
            "peak_gflops": f"{1e-9 * peak:.1f}",
            "commit": commit(),
        }
        records.append(record)
    return records


def profile(fast: torch.nn.Module, images: torch.Tensor) -> dict[str, float]:
    """Seconds of one image by part; what no part accounts for is `rest`."""
    _cpu.profile(True)
    start = time.perf_counter()
    fast(images)
    whole = time.perf_counter() - start
    parts = {part: s for part, s in _cpu.profile(False).items() if part != "waiting"}
    parts = {"whole": whole, **parts, "rest": whole - sum(parts.values())}
    return {part: seconds / len(images) for part, seconds in parts.items()}


def parts_macs(shape: Spec, masks: Masks) -> dict[str, int]:
    """Executed multiply–accumulates of one image in each part that multiplies matrices.

    Where a token or two are all that a block keeps, the others' keys and values are folded away.
    """
    width, inner, patch = shape.width, shape.heads * shape.head_dim, shape.patch_size
    kept, alive = masks.counts, masks.alive
    attended = inner * sum(n * m for n, m in zip(kept, alive))
    mlp = width * shape.hidden * sum(kept)
    return {
        "embedding": shape.patches * shape.in_chans * patch[0] * patch[1] * width,
        "keys_values": 2 * width * inner * sum(m for n, m in zip(kept, alive) if n > 2),
        "queries": width * inner * sum(kept),
        "logits": attended,
        "values": attended,
        "projection": width * inner * sum(kept),
        "fc1": mlp,
        "fc2": mlp,
        "head": shape.head_tokens * width * shape.num_classes,
    }


def table(records: list[dict[str, str]]) -> str:
    lines = [f"{'part':<12}{'us':>9}{'share':>8}{'of peak':>9}"]
    for record in records:
        share = f"{100 * float(record['share']):.1f} %"
        peak = f"{100 * float(record['of_peak']):.0f} %" if record["of_peak"] else ""
        lines.append(f"{record['part']:<12}{record['microseconds']:>9}{share:>8}{peak:>9}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
