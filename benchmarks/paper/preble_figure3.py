"""Preble's Figure 3: mean and p99 latency against the rate, E2 against round robin and consistent hashing.

    python -m benchmarks.paper.preble_figure3 [--traces FOLDER]

Five workloads, on 2 and 4 groups of Mistral-7B on an A6000, and on 4 groups of Llama-3-70B on two H100 each. The rates
are those of the released configurations, for the H100 times what they serve more. Published are 1.5x to 14.5x lower
mean and 2x to 10x lower p99 latency than round robin; and that hashing beats Preble on LooGLE in overload.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.paper.experiment import (
    HASHING,
    PREBLE,
    SGLANG,
    average,
    averaged,
    make_parser,
    make_scenario,
    published,
    rounded,
    run_variants,
    save,
    scaled,
    select,
)
from preble_jax.sim.capacity import estimate_rate
from preble_jax.sim.panels import rate_panels
from preble_jax.sim.plots import Curve, Panel
from preble_jax.sim.scenario import Scenario, Source
from preble_jax.sim.sweep import Row

# Requests a second of two groups, and seconds, of the released configurations; of toolbench two rates more, because
# these groups serve more of it than the published ones did.
WORKLOADS: dict[str, tuple[tuple[float, ...], float]] = {
    "toolbench": ((3, 6, 9, 12, 15, 18, 24, 30), 300.0),
    "agent": ((3, 6, 9, 12, 15, 18), 300.0),
    "programming": ((0.5, 1, 2, 2.5, 3, 4, 5, 6), 625.0),
    "video_8k": ((1, 2, 3, 4, 5, 6, 7), 300.0),
    "loogle": ((0.1, 0.3, 0.5, 0.7, 0.9, 1.0, 1.2), 560.0),
}
CLUSTERS = (("mistral7b_a6000", 2), ("mistral7b_a6000", 4), ("llama70b_tp2_h100", 4))
POLICIES = (PREBLE, SGLANG, HASHING)
# The published names of what is compared here.
_REFERENCES = {"preble": PREBLE.name, "sglang": SGLANG.name, "chash": HASHING.name}
_REFERENCE_WORKLOADS = {"videoqa": "video_8k"}
_REFERENCE_METRICS = {
    "avg_latency": "latency_mean_s",
    "p99_latency": "latency_p99_s",
    "p50_norm_latency": "norm_latency_p50_s",
    "p99_norm_latency": "norm_latency_p99_s",
    "p90_norm_latency": "norm_latency_p90_s",
    "p50_tpot": "tpot_p50_s",
    "p99_tpot": "tpot_p99_s",
    "p50_latency": "latency_p50_s",
    "p90_latency": "latency_p90_s",
    "p50_ttft": "ttft_p50_s",
    "p99_ttft": "ttft_p99_s",
}


def scenarios(scale: float) -> list[tuple[str, Scenario]]:
    chosen = []
    for cost, groups in CLUSTERS:
        for workload, (rates, duration_s) in WORKLOADS.items():
            factor = groups / 2 * speed(cost, workload)
            for rate in rates:
                source = Source(workload=workload, rate=rounded(rate * factor), duration_s=duration_s)
                for policies in POLICIES:
                    scenario = make_scenario(policies, scaled(source, scale), groups=groups, cost=cost)
                    chosen.append((policies.name, scenario))
    return chosen


def speed(cost: str, workload: str) -> float:
    """How many times an A6000's rate this cost model serves, to half a step; 1 for the A6000."""
    if cost == "mistral7b_a6000":
        return 1.0
    source = Source(workload=workload, rate=1.0)
    rates = [estimate_rate(make_scenario(PREBLE, source, groups=4, cost=name)) for name in (cost, "mistral7b_a6000")]
    return max(round(2 * rates[0] / rates[1]) / 2, 0.5)


def gains(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of each workload and cluster: by how much round robin's and hashing's latency is above E2's, at each rate."""
    found = []
    for cost, groups in CLUSTERS:
        for workload in WORKLOADS:
            members = select(rows, cost=cost, groups=groups, workload=workload)
            for rate in sorted({row["rate"] for row in members}):
                at_rate = select(members, rate=rate)
                gain: dict[str, Any] = {"cost": cost, "groups": groups, "workload": workload, "rate": rate}
                for other in (SGLANG, HASHING):
                    for measure in ("latency_mean_s", "latency_p99_s"):
                        ours = average(select(at_rate, variant=PREBLE.name), measure)
                        theirs = average(select(at_rate, variant=other.name), measure)
                        name = f"{other.name} {measure.removesuffix('_s')}"
                        gain[name] = rounded(theirs / ours) if ours and theirs else None
                found.append(gain)
    return found


def beside(rows: Sequence[Row], references: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every published number on these workloads next to ours at that rate, where we ran it."""
    found = []
    for each in references:
        workload = _REFERENCE_WORKLOADS.get(each["workload"], each["workload"])
        measure, variant = _REFERENCE_METRICS.get(each["metric"]), _REFERENCES.get(each["policy"])
        for rate, value in zip(each["rates"], each["values"], strict=True):
            members = select(
                rows, cost="mistral7b_a6000", groups=each["groups"], workload=workload, variant=variant, rate=rate
            )
            if members and measure:
                labels = {key: each[key] for key in ("workload", "groups", "mode", "metric", "policy")}
                found.append({**labels, "rate": rate, "published": value, "ours": rounded(average(members, measure))})
    return found


def panels(rows: Sequence[Row], references: Sequence[dict[str, Any]]) -> list[Panel]:
    """With the published curves, where there are such, dashed."""
    drawn = []
    for cost, groups in CLUSTERS:
        for workload in WORKLOADS:
            for panel, measure in zip(
                rate_panels(select(rows, cost=cost, groups=groups, workload=workload)),
                ("latency_mean_s", "latency_p99_s"),
                strict=True,
            ):
                dashed = [
                    Curve(
                        label=f"{_REFERENCES[each['policy']]}, published",
                        x=each["rates"],
                        y=each["values"],
                        colour_of=_REFERENCES[each["policy"]],
                    )
                    for each in references
                    if cost == "mistral7b_a6000"
                    and (_REFERENCE_WORKLOADS.get(each["workload"], each["workload"]), each["groups"])
                    == (workload, groups)
                    and each["mode"] == "real"
                    and _REFERENCE_METRICS.get(each["metric"]) == measure
                    and each["policy"] in _REFERENCES
                ]
                title = f"{workload}, {groups} x {cost}"
                drawn.append(replace(panel, title=title, curves=[*panel.curves, *dashed], log_y=True))
    return drawn


def main(arguments: argparse.Namespace) -> None:
    references = published(arguments.traces)
    rows = run_variants(scenarios(arguments.scale), arguments)
    document = {"gains": gains(rows), "beside_published": beside(rows, references), "rows": averaged(rows)}
    save("preble_figure3", arguments, document, panels(rows, references))
    for gain in document["gains"]:
        print(*(f"{value}" for value in gain.values()))


if __name__ == "__main__":
    main(make_parser(__doc__, num_seeds=3).parse_args())
