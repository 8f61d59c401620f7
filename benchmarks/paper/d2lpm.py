"""D2LPM (arXiv 2501.14312): throughput against VTC, latency of each client against Preble, fairness, and its quanta.

    python -m benchmarks.paper.d2lpm

Two sets of eight clients on four groups of Mistral-7B on an A6000: in S1 one client sends eight times as much as each
of the others, in S2 one has prefixes four times as long. The lengths are ours, the paper does not give them all.
Published: up to 2.87x VTC's throughput (VTC does not look at prefixes), up to 7.18x lower latency of the others than
Preble's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.paper.experiment import (
    PREBLE,
    Policies,
    average,
    averaged,
    make_parser,
    make_scenario,
    rounded,
    run_variants,
    save,
    scaled,
    select,
    without,
)
from preble_jax.config import QueueSettings
from preble_jax.sim.fairness import service_over_time
from preble_jax.sim.intervals import mean_and_half_width
from preble_jax.sim.panels import rate_panels, service_panel
from preble_jax.sim.plots import Curve, Panel
from preble_jax.sim.scenario import Scenario, Source
from preble_jax.sim.sweep import Row

GROUPS, COST, DURATION_S = 4, "mistral7b_a6000", 300.0
SETS = ("d2lpm_s1", "d2lpm_s2")
# Below, near and beyond what the groups serve.
RATES = (32.0, 48.0, 64.0)
# The one that misbehaves.
GREEDY = "client-0"
D2LPM = Policies(name="D2LPM", placement="d2lpm", queue="dlpm")
VTC = Policies(name="VTC", placement="least_loaded", queue="vtc")
DEFAULT = Policies(name="default", placement="default", queue=QueueSettings().policy)
POLICIES = (D2LPM, VTC, PREBLE, DEFAULT)
Q_W = (1024, 2048, 4096, 8192, 16384, 32768)
Q_U = (512.0, 1024.0, 2048.0, 4096.0, 8192.0)
SERVICE_RATE = RATES[-1]


def source(workload: str, rate: float, scale: float) -> Source:
    return scaled(Source(workload=workload, rate=rate, duration_s=DURATION_S), scale)


def compared(scale: float) -> list[tuple[str, Scenario]]:
    return [
        (policies.name, make_scenario(policies, source(workload, rate, scale), groups=GROUPS, cost=COST))
        for workload in SETS
        for rate in RATES
        for policies in POLICIES
    ]


def quanta(scale: float) -> list[tuple[str, Scenario]]:
    """The placement's quantum with the queue's left alone, and the other way round."""
    settings: list[tuple[str, dict[str, object]]] = [(f"Q_w={q}", {"d2lpm_quantum_tokens": q}) for q in Q_W]
    settings += [(f"Q_u={q:g}", {"queue": {"policy": "dlpm", "dlpm_quantum": q}}) for q in Q_U]
    return [
        (name, make_scenario(D2LPM, source(workload, SERVICE_RATE, scale), groups=GROUPS, cost=COST, **more))
        for workload in SETS
        for name, more in settings
    ]


def clients(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of every setting: means over the seeds of the greedy client's times, and of the others' mean and worst."""
    found = []
    for row in averaged(without(rows, "tenants")):
        members = select(rows, workload=row["workload"], rate=row["rate"], variant=row["variant"])
        found.append({key: row[key] for key in ("workload", "rate", "variant")} | _client_times(members))
    return found


def _client_times(rows: Sequence[Row]) -> dict[str, Any]:
    times: dict[str, Any] = {}
    for key in ("latency_mean_s", "latency_p99_s", "ttft_mean_s", "ttft_p99_s"):
        others = [
            [tenant[key] for name, tenant in row["tenants"].items() if name != GREEDY and tenant[key] is not None]
            for row in rows
        ]
        greedy = [row["tenants"][GREEDY][key] for row in rows if row["tenants"][GREEDY][key] is not None]
        times[f"greedy {key}"] = rounded(mean_and_half_width(greedy)[0])
        times[f"others' mean {key}"] = rounded(mean_and_half_width([sum(x) / len(x) for x in others if x])[0])
        times[f"others' worst {key}"] = rounded(mean_and_half_width([max(x) for x in others if x])[0])
    return times


def quantum_panels(rows: Sequence[Row]) -> list[Panel]:
    """Throughput, fairness and hit ratio against each quantum."""
    drawn = []
    for letter, quantities in (("Q_w", Q_W), ("Q_u", Q_U)):
        for measure, label in (
            ("jain_index", "Jain's index"),
            ("hit_ratio", "hit ratio"),
            ("ttft_p99_s", "p99 TTFT, s"),
        ):
            curves = [
                Curve(
                    label=workload,
                    x=list(quantities),
                    y=[
                        average(select(rows, workload=workload, variant=f"{letter}={q:g}"), measure) or 0.0
                        for q in quantities
                    ],
                )
                for workload in SETS
            ]
            drawn.append(Panel(title=f"D2LPM, {letter}", x_label=letter, y_label=label, curves=curves, log_x=True))
    return drawn


def service_panels(scale: float) -> list[Panel]:
    """Of one seed each."""
    drawn = []
    for policies in POLICIES:
        scenario = make_scenario(policies, source("d2lpm_s1", SERVICE_RATE, scale), groups=GROUPS, cost=COST)
        times, tenants = service_over_time(scenario.run(), scenario.sim.tenants)
        drawn.append(service_panel(f"d2lpm_s1 at {SERVICE_RATE:g}/s, {policies.name}", times, tenants))
    return drawn


def main(arguments: argparse.Namespace) -> None:
    rows = run_variants(compared(arguments.scale), arguments, keep=("tenants",))
    of_clients = clients(rows)
    rows = without(rows, "tenants")
    swept = run_variants(quanta(arguments.scale), arguments)
    measures = ("throughput_tokens_per_s", "latency_p99_s", "ttft_p99_s", "jain_index")
    panels = [*rate_panels(rows, measures), *quantum_panels(swept), *service_panels(arguments.scale)]
    save("d2lpm", arguments, {"clients": of_clients, "rows": averaged(rows), "quanta": averaged(swept)}, panels)
    for client in of_clients:
        print(*client.values())


if __name__ == "__main__":
    main(make_parser(__doc__, num_seeds=5).parse_args())
