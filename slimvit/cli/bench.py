"""slimvit bench: dense and slim side by side, in slimvit and in other runtimes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from slimvit.cli import _own_code, common
from slimvit.errors import MasksError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimvit.bench import Report
    from slimvit.dynamic import Planner
    from slimvit.masks import Masks

HELP = "time dense and pruned models side by side in one run"
_DISTURBED_SHARE = 0.75


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `slimvit bench`."""
    common.add_model_arguments(parser)
    kept = common.add_kept_arguments(parser)
    kept.add_argument(
        "--keep",
        type=common.kept_counts,
        metavar="n1,…,nL",
        help="tokens kept in each block, prefix tokens included, 111x7 for seven times 111; "
        "the patches are spread evenly",
    )
    parser.add_argument(
        "--backend",
        default="auto",
        choices=("auto", *common.backends()),
        help="slimvit's back end (default auto; slimvit doctor tells what works)",
    )
    parser.add_argument(
        "--against",
        metavar="LIST",
        help="torch, torch.compile, onnxruntime, openvino, or none (default: all that work here)",
    )
    common.add_data_arguments(parser, required=False, labels=False)
    common.add_run_arguments(parser, batch_size=8)
    parser.add_argument(
        "--threads", type=common.whole_number(1), metavar="N", help="CPU threads of every runtime"
    )
    parser.add_argument(
        "--rounds",
        type=common.whole_number(1),
        default=10,
        metavar="R",
        help="rounds, of which median, min and max are told (default 10)",
    )
    parser.add_argument(
        "--seconds",
        type=common.number(above=0),
        default=1.0,
        metavar="S",
        help="length of one row's turn in a round (default 1)",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="CSV file to add the rows to")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table and the ratios, write the files."""
    from slimvit.bench import append_csv, bench, check_csv

    common.check_outputs(args, {"--json": args.json, "--csv": args.csv})
    if args.csv is not None:
        check_csv(args.csv)
    model = common.load_model(args)
    masks = _masks(args, model)
    if getattr(masks, "ragged", False):
        _warn_of_random(args)
    report = bench(
        model,
        masks,
        batch=args.batch_size,
        precision=args.precision or "float32",
        backend=args.backend,
        against=_against(args.against),
        threads=args.threads,
        rounds=args.rounds,
        seconds=args.seconds,
        images=_images(args, model),
        tell=lambda line: print(line, file=sys.stderr),
    )
    with common.then_say(describe(report)):
        try:
            if args.csv is not None:
                append_csv(args.csv, report)
        finally:
            if args.json is not None:
                common.write_json(args.json, report.to_json())
    return 0


def _warn_of_random(args: argparse.Namespace) -> None:
    """With thresholds the weights and the images decide how many patches are kept: name random."""
    keeps = "with thresholds each image keeps as many patches as it takes"
    if not (args.checkpoint or args.pretrained):
        common.warn(
            f"{keeps}, and random weights are no measure of yours: give --checkpoint or "
            "--pretrained"
        )
    if args.data_dir is None:
        common.warn(f"{keeps}, and random images are no measure of yours: give --data-dir")


def describe(report: Report) -> str:
    """The table of rows, the ratios, and what a reader should know about both."""
    header = ["runtime", "model", "precision", "images/s", "min", "max", "slim/dense", "of peak"]
    if report.batch == 1:
        header.insert(4, "ms")
    rows = []
    for row in report.rows:
        speed = row.images_per_second()
        speedup = report.speedup(row)
        model = row.plan if row.dynamic else "slim" if row.pruned else "dense"
        cells = [row.runtime, model, row.precision]
        cells += [f"{speed[name]:.1f}" for name in ("median", "min", "max")]
        if report.batch == 1:
            cells.insert(4, f"{1000 / speed['median']:.2f}")
        share = report.share_of_peak(row)
        cells.append("" if speedup is None else f"{speedup:.2f}")
        rows.append([*cells, "" if share is None else f"{100 * share:.0f} %"])
    by = "" if report.plan == "static" else f" by {report.plan}"
    return "\n".join(
        [
            f"{report.model}, batch {report.batch}, {report.precision}, {report.device_name}, "
            f"{report.threads} thread{'s' * (report.threads > 1)}, "
            f"{100 * report.cut:.1f} % fewer MACs" + by,
            "",
            common.table(rows, header),
            "",
            *_warning(report),
            *_ratio_lines(report),
            *_notes(report),
        ]
    )


def _warning(report: Report) -> list[str]:
    if report.best_share >= _DISTURBED_SHARE:
        return []
    return [
        f"warning: no row got more than {100 * report.best_share:.0f} % of its threads' CPU time: "
        "the machine is busy, or has fewer cores than --threads",
        "",
    ]


def _ratio_lines(report: Report) -> list[str]:
    ratios = report.ratios
    dense, slim = (getattr(report.strongest(pruned), "runtime", "") for pruned in (False, True))
    lines = []
    for name, words in (
        ("slim_over_strongest_dense", f"slim / strongest dense ({dense})"),
        ("slim_over_own_dense", "slim / own dense"),
        ("slim_over_strongest_slim", f"slim / strongest slim ({slim})"),
        ("dense_over_strongest_dense", f"dense / strongest dense ({dense})"),
        ("plan_over_static", f"{report.plan} / static masks of the same counts"),
    ):
        if name not in ratios:
            continue
        share = ratios.get(f"{name}_over_ideal")
        ideal = "" if share is None else f"  {100 * share:.1f} % of the ideal {report.ideal:.2f}"
        lines.append(f"{words:<40}{ratios[name]:6.2f}{ideal}")
    return lines


def _notes(report: Report) -> list[str]:
    notes = [f"without {name}: {reason}" for name, reason in report.left_out.items()]
    for row in report.rows:
        if row.agreement is not None:
            notes.append(
                f"{row.runtime}: {row.plan} keeps what float32 keeps in "
                f"{100 * row.agreement:.1f} % of the places"
            )
    if report.images:
        notes.append(f"timed on {report.images} images, a batch of {report.batch} in each round")
    if report.rejected:
        rest = f", {report.disturbed} more count all the same" if report.disturbed else ""
        notes.append(
            f"{report.rejected} turns rejected and repeated: the machine was busy elsewhere{rest}"
        )
    return ["", *notes] if notes else []


def _masks(args: argparse.Namespace, model: nn.Module) -> Masks | Planner:
    if args.keep is None:
        return common.load_masks(args, model)
    _own_code.load_imports(args)
    from slimvit.bench import format_keep
    from slimvit.masks import Masks
    from slimvit.models import check_masks, spec

    shape, counts = spec(model), args.keep
    if len(counts) != shape.depth:
        raise UsageError(f"--keep must be one for each of {shape.depth} blocks, got {len(counts)}")
    try:
        masks = Masks.from_counts(counts, shape.grid, shape.prefix)
        check_masks(masks, shape)
    except MasksError as error:
        raise UsageError(f"--keep {format_keep(counts)}: {error}") from error
    return masks


def _images(args: argparse.Namespace, model: nn.Module) -> Tensor | None:
    """A batch for each round from --data-dir, evenly spaced over it; None without it."""
    import torch

    if args.data_dir is None:
        for flag in ("subset", "samples", "workers"):
            if getattr(args, flag) is not None:
                raise UsageError(f"--{flag} needs --data-dir, whose images are then timed")
        return None
    wanted = args.rounds * args.batch_size
    if args.samples is None:
        args.samples = wanted
    found = [images for images, _ in common.load_images(args, model)]
    return torch.cat(found)[:wanted]


def _against(text: str | None) -> list[str] | None:
    if text is None:
        return None
    return [] if text == "none" else [name.strip() for name in text.split(",")]
