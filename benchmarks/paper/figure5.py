"""Preble's Figure 5: what each part of it is worth.

    python -m benchmarks.paper.figure5

ToolBench with prefixes of Zipf popularity, and VideoQA, on four groups of Mistral-7B on an A6000. From round robin over
longest-match queues: E2's placement alone, then with the adjustments after it (rebalancing, replicas), then with the
prefill/decode balance, then with the priority queue. Published: every part helps, E2 itself the most.
"""

from __future__ import annotations

import argparse

from benchmarks.paper.experiment import (
    SGLANG,
    Policies,
    averaged,
    make_parser,
    make_scenario,
    run_variants,
    save,
    scaled,
)
from preble_jax.sim.panels import ablation_panels
from preble_jax.sim.scenario import Scenario, Source

GROUPS, COST = 4, "mistral7b_a6000"
# Requests a second near where four groups are full, and beyond.
POINTS = (("toolbench_zipf", (24.0, 36.0), 300.0), ("video", (8.0, 12.0), 300.0))
_NO_ADJUSTMENT = {"rebalance": False, "autoscale": False}
# A share of decoding that no group's load can exceed.
_NO_BALANCE = {"imbalance_ratio": 2.0}
STAGES = (
    SGLANG,
    Policies(name="E2", placement="e2", queue="lpm", settings=_NO_ADJUSTMENT | _NO_BALANCE),
    Policies(name="+ adjustment", placement="e2", queue="lpm", settings=_NO_BALANCE),
    Policies(name="+ prefill/decode", placement="e2", queue="lpm"),
    Policies(name="+ priority queue", placement="e2", queue="priority_groups"),
)


def scenarios(scale: float) -> list[tuple[str, Scenario]]:
    chosen = []
    for workload, rates, duration_s in POINTS:
        for rate in rates:
            source = scaled(Source(workload=workload, rate=rate, duration_s=duration_s), scale)
            chosen += [(stage.name, make_scenario(stage, source, groups=GROUPS, cost=COST)) for stage in STAGES]
    return chosen


def main(arguments: argparse.Namespace) -> None:
    rows = run_variants(scenarios(arguments.scale), arguments)
    panels = ablation_panels(rows, ("latency_mean_s", "latency_p99_s"))
    save("figure5", arguments, {"rows": averaged(rows)}, panels)


if __name__ == "__main__":
    main(make_parser(__doc__, num_seeds=5).parse_args())
