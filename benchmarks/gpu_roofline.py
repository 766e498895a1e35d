"""The floor on GPUs: the least time of each kernel, and what folding and fusing kernels saves.

    python benchmarks/gpu_roofline.py                            # results/gpu-roofline.csv, tables
    python benchmarks/gpu_roofline.py --ceilings h200=788,4300   # measured TFLOP/s and GB/s

Arithmetic alone; it needs no GPU. `gpu_floor.py` says how a kernel is counted. Ceilings are the
vendor's datasheets' unless given. Where gpu-kernels.csv holds measured times, they stand beside.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from gpu_floor import CHIPS, PLANS, Chip, Kernel, kernels, total

from slimvit import Masks, models
from slimvit.bench import format_keep, parse_keep
from slimvit.files import atomic_write
from slimvit.macs import cut
from slimvit.models import Spec

MODELS = [f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")]
RESULTS = Path(__file__).parent / "results"
COLUMNS = ("chip", "model", "image_size", "batch", "bytes_per_value", "kept", "plan", "kernel")
COLUMNS += ("launches", "gflop", "mbytes", "microseconds", "bound", "peak_tflops", "peak_gbytes")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Record = dict[str, str]


class Network(NamedTuple):
    """A model, its masks, and the kernels of each plan, dense and slim."""

    spec: Spec
    masks: Masks
    dense: dict[str, list[Kernel]]
    slim: dict[str, list[Kernel]]


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    chips = [args.ceilings.get(name, CHIPS[name]) for name in args.chips]
    networks = [network(name, args) for name in args.models]
    records = [
        {**about(chip, shape, masks, args), "kept": format_keep(counts), "plan": plan, **row}
        for chip in chips
        for shape, masks, dense, slim in networks
        for plan in PLANS
        for counts, plans in (((shape.tokens,) * shape.depth, dense), (masks.counts, slim))
        for row in rows(chip, plans[plan])
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(args.output, text.getvalue().encode())
    print(f"Batch {args.batch}, {args.bytes_per_value} bytes a value, dense → slim\n")
    print(summary(chips, networks, args.batch))
    measured = read(args.measured)
    for net in networks:
        print(f"\n{net.spec.name}, {net.spec.image_size[0]} px, slim, plan {args.plan}: µs\n")
        print(kernel_table(chips, net, args, measured))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument(
        "--ceilings",
        nargs="+",
        action=Ceilings,
        default={},
        metavar="CHIP=TFLOPS,GBYTES",
        help="measured TFLOP/s and GB/s in the datasheet's place, such as h200=788,4300",
    )
    keep = "kept counts; at another --img-size the same fractions of the patches"
    parser.add_argument("--keep", default="141,141,131,121,111x7,1", help=keep)
    parser.add_argument("--img-size", type=int, help="default: the model's own, 224")
    parser.add_argument("--batch", type=int, default=256)
    size = "the datasheets' peaks are those of 2; give --ceilings for others"
    parser.add_argument("--bytes-per-value", type=int, default=2, choices=(1, 2, 4), help=size)
    parser.add_argument("--plan", default="fused", choices=PLANS, help="of the tables by kernel")
    parser.add_argument("--measured", type=Path, default=RESULTS / "gpu-kernels.csv")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu-roofline.csv")
    return parser


class Ceilings(argparse.Action):
    """`h200=788,4300` as a chip, by its key."""

    def __call__(self, parser, namespace, values, option_string=None):
        chips = {}
        for value in values:
            try:
                key, numbers = value.split("=")
                tera, giga = map(float, numbers.split(","))
                chips[key] = replace(CHIPS[key], flops=1e12 * tera, bandwidth=1e9 * giga)
            except (KeyError, ValueError):
                known = ", ".join(CHIPS)
                parser.error(f"{option_string} takes h200=788,4300 ({known}), got {value!r}")
            if min(tera, giga) <= 0:
                parser.error(f"{option_string} must be above 0, got {value!r}")
        setattr(namespace, self.dest, chips)


def network(name: str, args: argparse.Namespace) -> Network:
    shape = models.spec(models.create(name))
    counts = parse_keep(args.keep)
    if args.img_size is not None:
        shape, counts = resized(shape, counts, args.img_size)
    masks = Masks.from_counts(counts, shape.grid, shape.prefix)
    full = (shape.tokens,) * shape.depth
    size = (args.batch, args.bytes_per_value)
    dense = {plan: kernels(shape, full, full, *size, plan) for plan in PLANS}
    slim = {plan: kernels(shape, masks.counts, masks.alive, *size, plan) for plan in PLANS}
    return Network(shape, masks, dense, slim)


def resized(shape: Spec, counts: Sequence[int], pixels: int) -> tuple[Spec, list[int]]:
    """The model at another image size, and the same fraction of its patches kept."""
    grid = (pixels // shape.patch_size[0], pixels // shape.patch_size[1])
    large = replace(shape, image_size=(pixels, pixels), grid=grid)
    scale = large.patches / shape.patches
    # A last block without patches keeps the tokens that the head reads, whatever the size.
    kept = [
        n if n <= shape.prefix else shape.prefix + round(scale * (n - shape.prefix)) for n in counts
    ]
    return large, kept


def about(chip: Chip, shape: Spec, masks: Masks, args: argparse.Namespace) -> Record:
    return {
        "chip": chip.name,
        "model": shape.name,
        "image_size": str(shape.image_size[0]),
        "batch": str(args.batch),
        "bytes_per_value": str(args.bytes_per_value),
        "peak_tflops": f"{1e-12 * chip.flops:g}",
        "peak_gbytes": f"{1e-9 * chip.bandwidth:g}",
    }


def rows(chip: Chip, plan: Sequence[Kernel]) -> list[Record]:
    """What each kernel's launches take together, then the whole, bound by what takes more of it."""
    floors = [(kernel, chip.seconds(kernel), chip.bound(kernel)) for kernel in plan]
    whole = seconds(chip, plan)
    waiting = sum(time for _, time, bound in floors if bound == "memory")
    floors.append((total(plan), whole, "memory" if 2 * waiting > whole else "compute"))
    return [
        {
            "kernel": kernel.name,
            "launches": str(kernel.launches),
            "gflop": f"{1e-9 * kernel.flops:.3f}",
            "mbytes": f"{1e-6 * kernel.bytes:.3f}",
            "microseconds": f"{1e6 * time:.2f}",
            "bound": bound,
        }
        for kernel, time, bound in floors
    ]


def seconds(chip: Chip, plan: Iterable[Kernel]) -> float:
    """The floor of a forward pass: its kernels run one after the other."""
    return sum(chip.seconds(kernel) for kernel in plan)


def summary(chips: Sequence[Chip], networks: Sequence[Network], batch: int) -> str:
    """Images a second, what plans save, slim over dense, and launches: Markdown."""
    head = [*(f"{plan}, images/s" for plan in PLANS), "folding saves", "fusing saves"]
    head += ["slim / dense", "ideal", "launches"]
    lines = ["| chip | model | " + " | ".join(head) + " |", "| --- " * (2 + len(head)) + "|"]
    for chip in chips:
        for shape, masks, dense, slim in networks:
            times = [(seconds(chip, dense[p]), seconds(chip, slim[p])) for p in PLANS]
            cells = [chip.name, shape.name]
            cells += [" → ".join(f"{batch / t:,.0f}" for t in pair) for pair in times]
            for before, after in ((times[0], times[1]), (times[1], times[2])):
                saved = (100 * (1 - b / a) for a, b in zip(before, after, strict=True))
                cells.append(" → ".join(f"{s:.0f} %" for s in saved))
            cells.append(" / ".join(f"{full / less:.2f}" for full, less in times))
            cells.append(f"{1 / (1 - cut(shape, masks)):.2f}")
            cells.append(" / ".join(str(total(slim[plan]).launches) for plan in PLANS))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kernel_table(
    chips: Sequence[Chip], net: Network, args: argparse.Namespace, measured: Sequence[Record]
) -> str:
    """Floors of a slim plan's kernels, and what was measured on each chip: Markdown."""
    head = ["kernel", "launches", "GFLOP", "MB"]
    head += [cell for chip in chips for cell in (f"{chip.name}, bound", "measured")]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    by_chip = [rows(chip, net.slim[args.plan]) for chip in chips]
    for per_chip in zip(*by_chip, strict=True):
        first = per_chip[0]
        cells = [first["kernel"], first["launches"], first["gflop"], first["mbytes"]]
        for chip, row in zip(chips, per_chip, strict=True):
            cells.append(f"{float(row['microseconds']):.1f}, {row['bound']}")
            asked = {**about(chip, net.spec, net.masks, args), "kernel": row["kernel"]}
            asked["kept"] = format_keep(net.masks.counts)
            time = found(measured, asked)
            share = "" if time is None else f" ({100 * float(row['microseconds']) / time:.0f} %)"
            cells.append("not measured" if time is None else f"{time:.1f}{share}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read(path: Path) -> list[Record]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def found(measured: Iterable[Record], asked: Record) -> float | None:
    """Microseconds of the latest row that fits; what a row does not tell cannot contradict."""
    time = None
    chip = asked["chip"].split()[0]  # "A100" is in "NVIDIA A100-SXM4-80GB"
    for row in measured:
        same = all(row[key] == asked[key] for key in ("model", "kernel", "batch"))
        same &= all(row.get(key, asked[key]) == asked[key] for key in ("kept", "image_size"))
        size = str(BYTES.get(row["precision"]))
        if same and chip in row["device"] and size == asked["bytes_per_value"]:
            time = float(row["microseconds"])
    return time


if __name__ == "__main__":
    main()
