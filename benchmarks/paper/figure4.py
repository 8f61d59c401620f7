"""Preble's Figure 4: ToolBench and VideoQA together, on Azure's arrivals, against the rate.

    python -m benchmarks.paper.figure4 [--traces FOLDER]

Four groups of Mistral-7B on an A6000. With --traces the times are those of Azure's conversation trace, stretched to the
rate; without it, arrivals as bursty as these.
"""

from __future__ import annotations

import argparse

from benchmarks.paper.experiment import (
    HASHING,
    PREBLE,
    SGLANG,
    averaged,
    make_parser,
    make_scenario,
    run_variants,
    save,
    scaled,
)
from preble_jax.sim.panels import rate_panels
from preble_jax.sim.scenario import Scenario, Source

GROUPS, COST, DURATION_S = 4, "mistral7b_a6000", 300.0
RATES = (4.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0)
MEASURES = ("latency_mean_s", "latency_p99_s", "ttft_mean_s", "ttft_p99_s", "tpot_mean_s", "hit_ratio")


def scenarios(arguments: argparse.Namespace) -> list[tuple[str, Scenario]]:
    times = str(arguments.traces / "azure" / "AzureLLMInferenceTrace_conv.csv") if arguments.traces else ""
    chosen = []
    for rate in RATES:
        source = Source(workload="preble_mix", rate=rate, duration_s=DURATION_S, arrivals=times)
        for policies in (PREBLE, SGLANG, HASHING):
            scenario = make_scenario(policies, scaled(source, arguments.scale), groups=GROUPS, cost=COST)
            chosen.append((policies.name, scenario))
    return chosen


def main(arguments: argparse.Namespace) -> None:
    rows = run_variants(scenarios(arguments), arguments)
    arrivals = "Azure's" if arguments.traces else "as bursty as Azure's"
    save("figure4", arguments, {"arrivals": arrivals, "rows": averaged(rows)}, rate_panels(rows, MEASURES), columns=3)


if __name__ == "__main__":
    main(make_parser(__doc__, num_seeds=5).parse_args())
