"""Dense and slim side by side: images per second of every runtime, measured in alternating rounds.

    report = bench(model, masks, batch=8, precision="bfloat16")
    report.ratios["slim_over_own_dense"], report.to_json()

No runtime is timed whose logits do not match the reference.
"""

from slimvit.bench._csv import CSV_COLUMNS, append_csv, check_csv
from slimvit.bench._keep import format_keep, parse_keep
from slimvit.bench._latency import LatencyTable, latency_table, time_calls
from slimvit.bench._machine import commit, device_name
from slimvit.bench._report import Report, Row, ratios_of
from slimvit.bench._run import bench
from slimvit.bench._runtimes import RUNTIMES, Runtime, Setting, Workload, openvino_core
from slimvit.bench._target import keep_for_latency, measure_latency, plan_for_latency
from slimvit.bench._verify import TOLERANCES

__all__ = [
    "CSV_COLUMNS",
    "RUNTIMES",
    "TOLERANCES",
    "LatencyTable",
    "Report",
    "Row",
    "Runtime",
    "Setting",
    "Workload",
    "append_csv",
    "bench",
    "check_csv",
    "commit",
    "device_name",
    "format_keep",
    "keep_for_latency",
    "latency_table",
    "measure_latency",
    "openvino_core",
    "parse_keep",
    "plan_for_latency",
    "ratios_of",
    "time_calls",
]
