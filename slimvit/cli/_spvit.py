"""SPViT's flags of `slimvit finetune`, and the plan that they ask for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slimvit.cli import common
from slimvit.cli._types import block_numbers, number, ratios
from slimvit.dynamic import SPViT, load_plan
from slimvit.dynamic.spvit import KEEP
from slimvit.errors import PlanError, UsageError
from slimvit.finetune import plan_path, resume_path
from slimvit.models import spec

if TYPE_CHECKING:
    from torch import nn

    from slimvit.bench import LatencyTable


class Target(NamedTuple):
    """A target latency, and the table by which it is met."""

    target_ms: float
    table: LatencyTable

    def measure(self, model: nn.Module, plan: SPViT) -> dict[str, Any]:
        """What the accelerated model takes, told beside the target."""
        from slimvit.bench import measure_latency

        took, target, table = measure_latency(model, plan, self.table), *self
        common.say(
            f"latency {took.ms:.3f} ms beside {took.dense_ms:.3f} ms unpruned; at the pace of the "
            f"table, {table.dense_ms:.3f} ms unpruned, {took.at_pace_ms:.3f} ms, target "
            f"{target:.3f} ms ({took.at_pace_ms / target - 1:+.1%}): {table.backend}, "
            f"{table.precision}, batch {table.batch}"
        )
        return {
            "target_ms": target,
            "measured_ms": took.ms,
            "measured_dense_ms": took.dense_ms,
            "at_pace_ms": took.at_pace_ms,
            "predicted_ms": table.predict(plan),
            "table": table.to_json(),
        }


def add_arguments(parser: argparse.ArgumentParser, kept: argparse._MutuallyExclusiveGroup) -> None:
    """Add --spvit to the group, and --stages, --target-latency, --latency-table, --backend."""
    kept.add_argument(
        "--spvit",
        nargs="?",
        type=ratios,
        const=list(KEEP),
        metavar="R1,R2,…",
        help="train SPViT's selectors with the model; each leaves such a share of all patches, "
        f"{','.join(map(str, KEEP))} if not given",
    )
    group = parser.add_argument_group("with --spvit")
    group.add_argument(
        "--stages",
        type=block_numbers,
        metavar="l1,l2,…",
        help="blocks that selectors stand before, from 0 (default: evenly spread, 3,6,9 of 12)",
    )
    group.add_argument(
        "--target-latency",
        type=number(above=0),
        metavar="MS",
        help="choose the shares so that the accelerated model takes so long on this device",
    )
    group.add_argument(
        "--latency-table",
        type=Path,
        metavar="FILE",
        help="from slimvit latency-table --json (default: measured now, for batch 1)",
    )
    group.add_argument(
        "--backend",
        choices=("auto", *common.backends()),
        help="back end that the target is for (default auto)",
    )


def check(args: argparse.Namespace, world: int) -> None:
    """Refuse flags that have no meaning together.

    Raises:
        UsageError: one needs another, or excludes it.
    """
    needs = {"--stages": "spvit", "--target-latency": "spvit"}
    needs |= {"--latency-table": "target_latency", "--backend": "target_latency"}
    for flag, other in needs.items():
        given = getattr(args, flag[2:].replace("-", "_")) is not None
        if given and getattr(args, other) is None:
            raise UsageError(f"{flag} needs --{other.replace('_', '-')}")
    if args.spvit is not None and args.target_latency is None:
        try:
            SPViT(args.spvit, stages=args.stages)
        except PlanError as error:
            raise UsageError(f"--spvit, --stages: {error}") from error
    if args.target_latency is not None and args.spvit != list(KEEP):
        raise UsageError("--target-latency chooses the shares: give --spvit without any")
    if args.latency_table is not None and args.backend is not None:
        raise UsageError("--latency-table says which back end: leave --backend out")
    if world > 1 and args.target_latency is not None and args.latency_table is None:
        raise UsageError("--target-latency in several processes needs --latency-table")


def make_plan(
    args: argparse.Namespace, dense: nn.Module, world: int
) -> tuple[SPViT, Target | None]:
    """The plan of --spvit, bound to the model, and the target if there is one."""
    shape = spec(dense)
    if args.target_latency is None:
        return SPViT(args.spvit, stages=args.stages).bind(shape), None
    from slimvit.bench import LatencyTable, keep_for_latency, latency_table, plan_for_latency

    if args.latency_table is not None:
        table = LatencyTable.load(args.latency_table)
        table.check(shape)
    else:
        common.say("measuring the latency of blocks …")
        options = {"backend": args.backend or "auto", "precision": args.precision or "float32"}
        table = latency_table(dense, **options)
    latency = Target(args.target_latency, table)
    unfinished = resume_path(args.output).exists() and not args.restart
    if unfinished and plan_path(args.output).exists():
        # The run goes on with the shares that it began with, whatever is measured now.
        begun = load_plan(plan_path(args.output))
        if isinstance(begun, SPViT):
            return SPViT(**begun.settings()).bind(shape), latency
    if world > 1:
        plan = keep_for_latency(table, shape, latency.target_ms, args.stages)
    else:
        plan, _ = plan_for_latency(dense, table, latency.target_ms, stages=args.stages)
    shares = ", ".join(f"{share:.3f}" for share in plan.shares)
    common.say(
        f"keeping {shares} of the patches for {latency.target_ms:.3f} ms, "
        f"by the table {table.predict(plan):.3f} ms"
    )
    return plan, latency
