"""slimvit latency-table: block latency against the share of kept patches, on this device."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from slimvit.cli import common
from slimvit.cli._types import ratios

if TYPE_CHECKING:
    from slimvit.bench import LatencyTable

HELP = "measure what blocks cost by the share of patches that they keep"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `slimvit latency-table`."""
    common.add_model_arguments(parser)
    parser.add_argument(
        "--backend",
        default="auto",
        choices=("auto", *common.backends()),
        help="what computes the blocks (default auto: the fastest that works)",
    )
    parser.add_argument(
        "--keep-ratios",
        type=ratios,
        metavar="R1,R2,…",
        help="shares of the patches to measure, two or more (default: nine from 1 to 0.1)",
    )
    common.add_run_arguments(parser, batch_size=1, precision="of the blocks (default float32)")
    parser.add_argument("--threads", type=common.whole_number(1), metavar="N", help="CPU threads")
    parser.add_argument(
        "--rounds",
        type=common.whole_number(1),
        default=10,
        metavar="R",
        help="rounds, of which the median is told (default 10)",
    )
    parser.add_argument(
        "--seconds",
        type=common.number(above=0),
        default=0.1,
        metavar="S",
        help="length of one row's turn in a round (default 0.1)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON."""
    from slimvit.bench import latency_table

    common.check_outputs(args, {"--json": args.json})
    options = {} if args.keep_ratios is None else {"ratios": args.keep_ratios}
    table = latency_table(
        common.load_model(args),
        backend=args.backend,
        precision=args.precision or "float32",
        batch=args.batch_size,
        threads=args.threads,
        rounds=args.rounds,
        seconds=args.seconds,
        **options,
    )
    with common.then_say(describe(table)):
        if args.json is not None:
            common.write_json(args.json, table.to_json())
    return 0


def describe(table: LatencyTable) -> str:
    """Milliseconds by the share of patches, and of the rest, under a line on what was measured."""
    rows = [
        [f"{row.keep:.2f}", row.tokens, *(f"{ms:.3f}" for ms in (row.block_ms, row.last_ms))]
        + [f"{row.selector_ms:.3f}"]
        for row in table.rows
    ]
    threads = f"{table.threads} thread{'s' * (table.threads > 1)}"
    return (
        f"{table.model}, batch {table.batch}, {table.precision}, {table.device_name}, {threads}, "
        f"back end {table.backend}; milliseconds\n\n"
        + common.table(rows, ("patches kept", "tokens", "block", "last block", "selector"))
        + f"\n\nembedding, head and the rest {table.rest_ms:.3f}, "
        f"the whole model unpruned {table.dense_ms:.3f}"
    )
