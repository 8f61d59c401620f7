"""`preble-jax sim`: simulates a cluster under a workload or a trace; a table, and everything as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from preble_jax.errors import ConfigError
from preble_jax.progress import make_progress
from serve.output_file import require_writable, write_file
from serve.sim_arguments import refuse_idle, scenarios_of, slo_of

if TYPE_CHECKING:
    from preble_jax.sim.record import SimResult
    from preble_jax.sim.scenario import Scenario

_FILE_WIDTH = 200
_MOST_GROUPS = 16  # more of them are in the file only


def run_sim(arguments: argparse.Namespace) -> int:
    """Exit status 0. Raises ConfigError and InvalidRequestError, before anything is simulated where that can be."""
    from preble_jax.sim.summary import summarize

    refuse_idle(arguments)
    require_writable("--json", arguments.json)
    scenarios = scenarios_of(arguments)
    if len(scenarios) != 1:
        raise ConfigError(f"expected one value an argument, got {len(scenarios)} combinations; use sim sweep")
    (scenario,) = scenarios
    slo = slo_of(arguments)
    progress = make_progress()
    with progress.task(f"making {scenario.source.name}"):
        workload = scenario.source.load(scenario.sim.num_groups, scenario.sim.seed)
        scenario.source.require_requests(workload)
    result = scenario.run(workload, progress=progress)
    summary = summarize(result, scenario.sim.tenants, slo) | {"length_scale": workload.length_scale}
    try:
        if arguments.json is not None:  # before what is printed, whose reader may go away
            document = to_json(scenario, result, summary)
            write_file("--json", arguments.json, json.dumps(document, indent=1) + "\n")
    finally:
        _print(scenario, summary)
    return 0


def _print(scenario: Scenario, summary: Mapping[str, Any]) -> None:
    console = make_console()
    console.print(_head(scenario, summary))
    console.print(_times(summary))
    if len(summary["groups"]) <= _MOST_GROUPS:
        console.print(_groups(summary["groups"]))
    if len(summary["tenants"]) > 1:
        console.print(_tenants(summary["tenants"]))


def make_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_FILE_WIDTH)  # in a file a row stays a line


def to_json(scenario: Scenario, result: SimResult, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What --json writes; docs/simulator.md describes it."""
    from preble_jax.sim.fairness import service_over_time

    times_s, service = service_over_time(result, scenario.sim.tenants)
    return {
        "command": command_line(),
        "settings": asdict(scenario),
        "summary": {key: value for key, value in summary.items() if key not in ("groups", "tenants")},
        "groups": summary["groups"],
        "tenants": summary["tenants"],
        "service": {"times_s": times_s, "tenants": service},
        "requests": [asdict(record) for record in result.requests],
    }


def command_line() -> str:
    return " ".join(["preble-jax", *sys.argv[1:]])


def _head(scenario: Scenario, summary: Mapping[str, Any]) -> Table:
    sim = scenario.sim
    rate = "its own times" if scenario.source.rate is None else f"{scenario.source.rate:g} requests/s"
    title = (
        f"{scenario.source.name} at {rate}, {sim.num_groups} groups of {scenario.cost}, {sim.sched.policy} + "
        f"{sim.queue.policy}, seed {sim.seed}"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    lost = ", ".join(
        f"{summary[key]} {key}" for key in ("rejected", "failed", "unfinished", "truncated") if summary[key]
    )
    table.add_row("requests", f"{summary['requests']}" + (f" ({lost})" if lost else ""))
    if scenario.source.length_scale != 1.0:
        table.add_row("lengths", scale_text(scenario.source.length_scale, summary["length_scale"]))
    table.add_row("simulated", f"{summary['end_s']:.1f} s in {summary['wall_s']:.1f} s")
    table.add_row("throughput", f"{summary['throughput_per_s']:.2f} requests/s")
    limits = ", ".join(f"{metric} {limit:g} s" for metric, limit in summary["slo"].items())
    if limits:
        table.add_row(f"goodput ({limits})", f"{summary['goodput']:.2f} requests/s, {summary['slo_attainment']:.1%}")
    table.add_row("hit ratio", f"{summary['hit_ratio']:.1%}")
    table.add_row("imbalance", f"{summary['imbalance']:.2f}")
    table.add_row("Jain's index", f"{summary['jain_index']:.3f}")
    table.add_row("largest service gap", f"{summary['largest_service_gap']:.0f}")
    table.add_row("a placement", f"{summary['place_s'] * 1e6:.0f} us")
    return table


def _times(summary: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("seconds")
    for column in ("mean", "p50", "p90", "p99"):
        table.add_column(column, justify="right")
    for metric in ("latency", "ttft", "tpot", "queue"):
        table.add_row(metric, *(show(summary[f"{metric}_{column}_s"]) for column in ("mean", "p50", "p90", "p99")))
    return table


def _groups(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("group")
    for column in ("requests", "busy", "steps", "computed tokens", "cached tokens", "output tokens", "evicted pages"):
        table.add_column(column, justify="right")
    for row in rows:
        counts = (row[key] for key in ("num_steps", "extend_tokens", "cached_tokens", "output_tokens", "num_evicted"))
        table.add_row(row["group"], f"{row['requests']}", f"{row['utilization']:.1%}", *(f"{n}" for n in counts))
    return table


def _tenants(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("tenant")
    for column in ("requests", "service", "of its share", "latency mean", "p99", "TTFT mean", "p99"):
        table.add_column(column, justify="right")
    for tenant, row in rows.items():
        times = (row[key] for key in ("latency_mean_s", "latency_p99_s", "ttft_mean_s", "ttft_p99_s"))
        share = row["fair_share_ratio"]
        table.add_row(tenant, f"{row['requests']}", f"{row['service']:.0f}", show(share), *map(show, times))
    return table


def scale_text(asked: float, exact: float) -> str:
    """Of a trace's lengths."""
    return f"times {asked:g}" if asked == exact else f"times {exact:.6g}: {asked:g} leaves no whole blocks"


def show(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def print_names() -> int:
    from preble_jax.sim.cost import COSTS, find_cost
    from preble_jax.sim.workloads import WORKLOADS

    workloads = Table(title="workloads", title_justify="left", box=box.SIMPLE, show_header=False)
    for name, description in WORKLOADS.items():
        workloads.add_row(name, description)
    costs = Table(title="cost models", title_justify="left", box=box.SIMPLE)
    for column in ("name", "KV tokens", "prompt tokens a step", "sequences"):
        costs.add_column(column, justify="left" if column == "name" else "right")
    for name in COSTS:
        engine = find_cost(name).engine
        costs.add_row(name, f"{engine.kv_tokens}", f"{engine.prefill_tokens}", f"{engine.max_num_seqs}")
    make_console().print(workloads, costs)
    return 0
