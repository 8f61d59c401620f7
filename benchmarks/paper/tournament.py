"""Every placement policy on every workload and trace: SLO capacity, and p99 at fixed rates.

    python -m benchmarks.paper.tournament --traces FOLDER [--requests 3000] [--queue NAME] [--rows FILE]

Four groups of Mistral-7B on an A6000 (198,516 tokens of keys and values each). The capacity is the highest rate at
which 99 of 100 requests have their first token within the SLO: 5 s, or five times what a prompt of mean length takes
alone and uncached, or 1.5 times what one of the longest percent takes, whatever is most. No policy is tuned for a
workload; each has the queue that it is published with, or all have --queue. The fixed rate of a workload is E2's
capacity. A case of so few requests that some policy serves them at any rate has neither; there, all of them come at
once, and measured is how soon they are served: requests a second until the last has ended, and the times to the first
token. Where the requests at E2's or the
default's capacity have all come before the first can be late, it says how fast a burst drains: such cases are marked,
and count in the totals that end in `_with_bursts` only.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.paper.experiment import Policies, make_parser, make_scenario, rounded, save, select
from preble_jax.config import QueueSettings
from preble_jax.progress import make_progress
from preble_jax.sim.capacity import find_capacities, lasts
from preble_jax.sim.cost import find_cost
from preble_jax.sim.cost.scheduling import prompt_s
from preble_jax.sim.intervals import geometric_mean, mean_and_half_width
from preble_jax.sim.plots import Panel
from preble_jax.sim.rate_search import MOST_RATE
from preble_jax.sim.scenario import Scenario, Source
from preble_jax.sim.slo import Target
from preble_jax.sim.sweep import Job, Row, RowFile, make_workers, run_grid

GROUPS, COST = 4, "mistral7b_a6000"
TOLERANCE = 0.03
# Requests a second, a tenth of what a search ends at: the trace is over before it has loaded anything.
UNBOUNDED = MOST_RATE / 10
LEAST_SLO_S, ALONE_FACTOR, LONG_FACTOR = 5.0, 5.0, 1.5
FIXED = (1.0,)  # of E2's capacity
# Of a case without a capacity, and whether more is better.
AT_ONCE = (("throughput_per_s", True), ("ttft_p99_s", False), ("ttft_mean_s", False))
LONGEST_S = 600.0
E2, DEFAULT = "e2", "default"
POLICIES = tuple(
    Policies(name=name, placement=name, queue=queue)
    for name, queue in (
        (DEFAULT, QueueSettings().policy),
        (E2, "priority_groups"),
        ("d2lpm", "dlpm"),
        ("round_robin", "priority_groups"),
        ("least_loaded", "priority_groups"),
        ("consistent_hashing", "priority_groups"),
        ("cache_aware", "priority_groups"),
        ("dynamo_cost", "priority_groups"),
        ("lmetric", "priority_groups"),
        ("cacheroute", "priority_groups"),
        ("preble_released", "priority_groups"),
    )
)
WORKLOADS = (
    *("toolbench", "toolbench_zipf", "agent", "programming", "video", "loogle", "mixed", "unshared"),
    *("zipf", "zipf_steep", "hot_prefix", "shift", "burst", "chat", "assistants"),
    *("d2lpm_s1", "d2lpm_s2", "vtc_short_long", "noisy_tenant", "shared_tools"),
)
# Files under --traces, and what their lengths are multiplied by: Mooncake's prompts of 12,000 tokens share so little
# that nothing would fit these groups.
TRACES = (
    ("hash_b16/toolbench_cot.jsonl", 1.0),
    ("hash_b16/alfworld_react_synth.jsonl", 1.0),
    ("hash_b16/gsm8k_8shot.jsonl", 1.0),
    ("hash_b16/hotpotqa_react_first1000.jsonl", 1.0),
    ("hash_b16/lmcache_miniswe.jsonl", 1.0),
    ("hash_b16/loogle_sample.jsonl", 1.0),
    ("mooncake/conversation_trace.jsonl", 0.125),
    ("azure/AzureLLMInferenceTrace_conv.csv", 1.0),
    ("vtc/vtc_real_trace.csv", 1.0),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    source: Source
    target: Target

    def job(self, policies: Policies, seed: int, rate: float | None = None) -> Job:
        """A probe of the target; with a rate, an ordinary run."""
        source = self.source if rate is None else replace(self.source, rate=rate)
        scenario = make_scenario(policies, source, groups=GROUPS, cost=COST, seed=seed)
        return Job(scenario=scenario, target=self.target if rate is None else None)


def cases(traces: Path | None, num_requests: int, only: Sequence[str]) -> list[Case]:
    sources = [Source(workload=name, rate=1.0, num_requests=num_requests, duration_s=LONGEST_S) for name in WORKLOADS]
    if traces is not None:
        sources += [
            Source(trace=str(traces / file), rate=1.0, num_requests=num_requests, length_scale=scale)
            for file, scale in TRACES
        ]
    chosen = [source for source in sources if not only or source.name in only]
    return [Case(name=source.name, source=source, target=target_of(source)) for source in chosen]


def target_of(source: Source) -> Target:
    workload = Scenario(source=replace(source, num_requests=1000)).source.load(GROUPS, 0)
    mean_tokens = round(workload.num_prompt_tokens / len(workload.requests))
    long_tokens = sorted(request.num_prompt for request in workload.requests)[len(workload.requests) * 99 // 100]
    cost = find_cost(COST)
    limit_s = max(LEAST_SLO_S, ALONE_FACTOR * prompt_s(cost, mean_tokens), LONG_FACTOR * prompt_s(cost, long_tokens))
    return Target(metric="ttft", percentile=99, limit_s=float(round(limit_s)))


def capacity_rows(rows: Sequence[Row], chosen: Sequence[Case], policies: Sequence[Policies]) -> list[dict[str, Any]]:
    """A row a case and policy: mean and half of the 95% interval; over E2's, and over the best other one's. None in a
    case that some policy serves at any rate. lasts: of the requests at that policy's capacity, mean over the seeds;
    None where nothing passes. burst: in cases where E2's or the default's is below 1."""
    found = []
    for case in chosen:
        of_case = select(rows, workload=case.name)
        lasting = {each.name: _mean_lasts(select(of_case, placement=each.placement)) for each in policies}
        burst = any(lasting.get(name) is not None and lasting[name] < 1.0 for name in (E2, DEFAULT))
        compared = {}
        if not any(row["capacity"] > UNBOUNDED for row in of_case):
            compared = _compare(_by_seed(of_case, [row["capacity"] for row in of_case], policies))
        for each in policies:
            capacity, over_e2, best, over_best = compared.get(each.name, (None,) * 4)
            found.append(
                {
                    "workload": case.name,
                    "target": str(case.target),
                    "placement": each.name,
                    "capacity": capacity,
                    "over_e2": over_e2,
                    "best_baseline": best,
                    "over_best_baseline": over_best,
                    "lasts": lasting[each.name],
                    "burst": burst,
                }
            )
    return found


def _by_seed(rows: Sequence[Row], values: Sequence[float], policies: Sequence[Policies]) -> dict[str, dict[int, float]]:
    """Of each policy: the values, one a row, by the row's seed."""
    found: dict[str, dict[int, float]] = {each.name: {} for each in policies}
    names = {each.placement: each.name for each in policies}
    for row, value in zip(rows, values, strict=True):
        found[names[row["placement"]]][row["seed"]] = value
    return found


def _compare(by_seed: Mapping[str, Mapping[int, float]], more_is_better: bool = True) -> dict[str, tuple[Any, ...]]:
    """Of each policy: mean and half-width, over E2's, the best other policy, over that one's; ratios above 1: better
    than that one."""
    means = {name: mean_and_half_width(list(seeds.values())) for name, seeds in by_seed.items()}
    found = {}
    for name, spread in means.items():
        rivals = [rival for rival in means if rival not in (name, DEFAULT)]
        sign = 1 if more_is_better else -1
        best = max(rivals, key=lambda rival: sign * means[rival][0], default=None)
        pairs = [(by_seed[name], by_seed.get(rival or "", {})) for rival in (E2, best)]
        over_e2, over_best = (_over(mine, other) if more_is_better else _over(other, mine) for mine, other in pairs)
        found[name] = ([rounded(value) for value in spread], over_e2, best, over_best)
    return found


def _mean_lasts(rows: Sequence[Row]) -> float | None:
    values = [lasts(row) for row in rows if row["capacity"]]
    return rounded(sum(values) / len(values)) if values else None


def _over(mine: Mapping[int, float], others: Mapping[int, float]) -> list[float] | None:
    """The ratio of means over seeds, and half of the 95% interval of the seeds' ratios: policies saw the same requests,
    so it is narrower than those of the two means."""
    both = [seed for seed in mine if others.get(seed)]
    if not both:
        return None
    ratio = sum(mine[seed] for seed in both) / sum(others[seed] for seed in both)
    return [rounded(ratio), rounded(mean_and_half_width([mine[seed] / others[seed] for seed in both])[1])]


def fixed_rates(case: Case, capacities: Sequence[dict[str, Any]]) -> list[float]:
    """None where E2 has no capacity."""
    known = [row["capacity"] for row in capacities if (row["workload"], row["placement"]) == (case.name, E2)]
    return [rounded(share * capacity[0]) for capacity in known if capacity for share in FIXED]


def fixed_rows(rows: Sequence[Row], chosen: Sequence[Case], policies: Sequence[Policies]) -> list[dict[str, Any]]:
    measures = ("latency_mean_s", "latency_p99_s", "ttft_mean_s", "ttft_p99_s", "hit_ratio", "imbalance", "jain_index")
    found = []
    for case in chosen:
        rates = sorted({row["rate"] for row in select(rows, workload=case.name)})
        for rate in rates:
            for each in policies:
                members = select(rows, workload=case.name, placement=each.placement, rate=rate)
                spread = {
                    measure: [
                        rounded(value) for value in mean_and_half_width([row["summary"][measure] for row in members])
                    ]
                    for measure in measures
                }
                found.append({"workload": case.name, "rate": rate, "placement": each.name, **spread})
    return found


def at_once_jobs(
    capacities: Sequence[dict[str, Any]], chosen: Sequence[Case], policies: Sequence[Policies], num_seeds: int
) -> list[Job]:
    """All requests at once, of every case that has no capacity."""
    without = {row["workload"] for row in capacities if row["capacity"] is None}
    return [
        case.job(each, seed, MOST_RATE)
        for case in chosen
        if case.name in without
        for each in policies
        for seed in range(num_seeds)
    ]


def at_once_rows(rows: Sequence[Row], policies: Sequence[Policies]) -> list[dict[str, Any]]:
    """A row a case and policy. Of each measure: mean and half of the 95% interval, how many times better than E2's it
    is, the best other policy, and how many times better than that one's."""
    found = []
    for name in dict.fromkeys(row["workload"] for row in rows):
        of_case = select(rows, workload=name)
        compared = {
            measure: _compare(_by_seed(of_case, [row["summary"][measure] for row in of_case], policies), more_is_better)
            for measure, more_is_better in AT_ONCE
        }
        for each in policies:
            row = {"workload": name, "placement": each.name, "requests": of_case[0]["summary"]["requests"]}
            for measure, of_policies in compared.items():
                names = ("mean", "over_e2", "best_baseline", "over_best_baseline")
                row[measure] = dict(zip(names, of_policies[each.name], strict=True))
            found.append(row)
    return found


def totals(capacities: Sequence[dict[str, Any]], policies: Sequence[Policies]) -> list[dict[str, Any]]:
    """Of each policy over all cases but bursts, and over those too."""
    found = []
    for each in policies:
        rows = [row for row in capacities if row["placement"] == each.name]
        with_bursts = {f"{key}_with_bursts": value for key, value in _total(rows).items()}
        sustained = _total([row for row in rows if not row["burst"]])
        found.append({"placement": each.name, "queue": each.queue, **sustained, **with_bursts})
    return found


def _total(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one policy: geometric mean over E2's capacity, and the worst against the best baseline's."""
    over_e2 = [row["over_e2"][0] for row in rows if row["over_e2"] is not None]
    rated = [row for row in rows if row["over_best_baseline"] is not None]
    worst: dict[str, Any] = min(rated, key=lambda row: row["over_best_baseline"][0], default={})
    return {
        "over_e2": rounded(geometric_mean(over_e2)) if over_e2 else None,
        "worst_over_best_baseline": worst.get("over_best_baseline"),
        "worst_workload": worst.get("workload"),
    }


def panels(capacities: Sequence[dict[str, Any]], chosen: Sequence[Case]) -> list[Panel]:
    return [
        Panel(
            title=case.name,
            y_label=f"requests/s, {case.target}",
            bars={
                row["placement"]: (row["capacity"][0], row["capacity"][1])
                for row in capacities
                if row["workload"] == case.name
            },
        )
        for case in chosen
        if any(row["capacity"] for row in capacities if row["workload"] == case.name)
    ]


def main(arguments: argparse.Namespace) -> None:
    names = arguments.placements.split(",") if arguments.placements else [each.name for each in POLICIES]
    policies = [replace(each, queue=arguments.queue or each.queue) for each in POLICIES if each.name in names]
    chosen = cases(arguments.traces, round(arguments.requests * arguments.scale), arguments.only)
    file, progress = RowFile(arguments.rows), make_progress()
    with make_workers(arguments.processes) as workers:
        probes = [case.job(each, seed) for case in chosen for each in policies for seed in range(arguments.seeds)]
        rows = find_capacities(probes, tolerance=TOLERANCE, workers=workers, file=file, progress=progress)
        capacities = capacity_rows(rows, chosen, policies)
        fixed: list[Row] = []
        if not arguments.capacity_only:
            runs = [
                case.job(each, seed, rate)
                for case in chosen
                for rate in fixed_rates(case, capacities)
                for each in policies
                for seed in range(arguments.seeds)
            ]
            fixed = run_grid(runs, workers, file, progress)
        once = run_grid(at_once_jobs(capacities, chosen, policies, arguments.seeds), workers, file, progress)
    document = {
        "totals": totals(capacities, policies),
        "capacities": capacities,
        "fixed_rates": fixed_rows(fixed, chosen, policies),
        "at_once": at_once_rows(once, policies),
    }
    save("tournament", arguments, document, panels(capacities, chosen))
    for row in document["totals"]:
        print(*row.values())


if __name__ == "__main__":
    parser = make_parser(__doc__, num_seeds=5)
    parser.add_argument("--requests", type=int, default=3000, help="of a run; shorter traces are taken whole")
    parser.add_argument("--placements", default="", help="with commas between them; default: all")
    parser.add_argument("--queue", default="", help="of all policies; default: each one's own")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORKLOAD", help="workloads and traces by name")
    parser.add_argument("--capacity-only", action="store_true", help="no runs at fixed rates")
    main(parser.parse_args())
