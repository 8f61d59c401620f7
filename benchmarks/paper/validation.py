"""Is the simulator true? The same requests on a real cluster of two workers and in the simulator, side by side.

    python benchmarks/paper/validation.py --cost profile.json [--policies round_robin e2 default] [--json OUT]

What OUT has measured already is not measured again: an interrupted command goes on where it was, and a finished one
simulates again beside the same real runs.

Real: SmolLM2 on the CPU, a core for each worker, everything started anew for each run; client, frontend and scheduler
run on the same cores. Simulated: the same deployment's settings, step costs from `preble-jax profile --output
profile.json` on the same machine. Wanted: mean latency within 20%, hit ratio within 3 points, the same ranking.

What a step costs an engine alone is in the profile. Here its core has more to do: the worker's streams, and its share
of client, frontend and scheduler. How much, for each output token, is calibrated once, on a run of its own with other
requests: what its steps took beyond what they take in the simulator. Nothing else is fitted.

A placement may turn on milliseconds, and others follow from it: the simulator says what it says for VARIANTS of the
timing that cannot be told apart from outside. Their mean is compared; their range is printed beside it, and how often
each policy came first among them is in OUT.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_cluster import Outcome, run_on_cluster
from truth_table import compare, figures, show

from preble_jax.bench.machine import describe_machine
from preble_jax.config_files import load_config
from preble_jax.sim.cost import StepCost, StepWork, find_cost
from preble_jax.sim.request import SimRequest, Workload
from preble_jax.sim.settings import SimSettings
from preble_jax.sim.simulator import Simulator

# ToolBench's shape in small: a part that all share, a tool's, and the request's own.
SHARED_TOKENS, TOOL_TOKENS, OWN_TOKENS, OUTPUT_TOKENS = 240, 960, (32, 128), (8, 32)
NUM_TOOLS, ZIPF = 40, 0.8
NUM_REQUESTS, NUM_WARM_UP, WARM_UP_S = 200, 4, 4.0
RATES = (2.4, 3.3, 4.2)
CALIBRATION_RATE, CALIBRATION_REQUESTS, CALIBRATION_SEED = 2.4, 60, 1_000
PAGE_SIZE, NUM_PAGES, NUM_GROUPS = 16, 1456, 2  # 23,296 tokens a worker: not all tools fit on one
# network_s, event_lag_s, and what the calibrated overhead is multiplied by.
VARIANTS = tuple(itertools.product((0.005, 0.02), (0.0, 0.02), (0.9, 1.0, 1.1)))


@dataclass(frozen=True, kw_only=True)
class Overheads:
    """token_s: that an output token lengthens the step that makes it by, beyond the profile. network_s: from client to
    group: protocol, hashing, placement. event_lag_s: of messages to the scheduler."""

    token_s: float = 0.0
    network_s: float = 0.01
    event_lag_s: float = 0.005


class SharedCore:
    """A cost model whose core has other work, too."""

    def __init__(self, cost: StepCost, token_s: float) -> None:
        self.name = cost.name
        self.engine = cost.engine
        self._cost = cost
        self._token_s = token_s

    def step_s(self, work: StepWork) -> float:
        return self._cost.step_s(work) + self._token_s * work.num_decode


def make_requests(rate: float, num_requests: int, seed: int) -> Workload:
    """Poisson arrivals, behind NUM_WARM_UP requests that count nowhere. What is a request's own has no blocks."""
    rng = random.Random(seed)
    weights = list(itertools.accumulate(rank**-ZIPF for rank in range(1, NUM_TOOLS + 1)))
    shared, tool_blocks = SHARED_TOKENS // PAGE_SIZE, TOOL_TOKENS // PAGE_SIZE
    requests = [
        SimRequest(arrival_s=WARM_UP_S * i / NUM_WARM_UP, num_prompt=200, num_output=8) for i in range(NUM_WARM_UP)
    ]
    now = 2 * WARM_UP_S
    for _ in range(num_requests):
        now += rng.expovariate(rate)
        [tool] = rng.choices(range(NUM_TOOLS), cum_weights=weights)
        first = shared + tool * tool_blocks
        requests.append(
            SimRequest(
                arrival_s=now,
                num_prompt=SHARED_TOKENS + TOOL_TOKENS + rng.randint(*OWN_TOKENS),
                num_output=rng.randint(*OUTPUT_TOKENS),
                blocks=(*range(shared), *range(first, first + tool_blocks)),
            )
        )
    return Workload(name=f"tools at {rate:g}/s", block_size=PAGE_SIZE, requests=requests)


def overrides_of(policy: str, cost: Path) -> dict[str, str]:
    return {
        "sched.placement": policy,
        "sched.cost_file": str(cost),
        "kv.num_pages": str(NUM_PAGES),
        "serve.groups": str(NUM_GROUPS),
        "serve.start_timeout_s": "120",
    }


def simulate(
    workload: Workload, overrides: Mapping[str, str], cost: StepCost, overheads: Overheads
) -> tuple[list[Outcome], float]:
    """Outcomes, and the seconds in which steps ran."""
    config = load_config("local", dict(overrides))
    settings = SimSettings(
        num_groups=NUM_GROUPS,
        kv_tokens=NUM_PAGES * PAGE_SIZE,
        page_size=config.kv.page_size,
        prefill_tokens=config.engine.prefill_buckets[-1],
        max_prefill_seqs=config.engine.max_prefill_seqs,
        max_num_seqs=config.engine.max_num_seqs,
        sched=config.sched,
        queue=config.queue,
        tenants=config.tenants,
        event_lag_s=overheads.event_lag_s,
        report_interval_s=config.serve.report_interval_s,
        network_s=overheads.network_s,
        decode_steps=config.engine.decode_steps,
        max_dispatch_s=config.engine.max_dispatch_s,
    )
    result = Simulator(settings, SharedCore(cost, overheads.token_s)).run(workload)
    outcomes = [
        Outcome(
            ttft_s=(record.first_token_s or 0.0) - record.sent_s,
            latency_s=(record.finished_s or 0.0) - record.sent_s,
            prompt_tokens=record.num_prompt,
            cached_tokens=record.cached_tokens,
            output_tokens=record.made_tokens,
            group=record.group,
        )
        for record in result.requests
    ]
    return outcomes, sum(group.busy_s for group in result.groups)


def calibration_requests() -> Workload:
    return make_requests(CALIBRATION_RATE, CALIBRATION_REQUESTS, CALIBRATION_SEED)


def calibrate(cost_file: Path) -> dict[str, Any]:
    """A real run of requests that are not compared. Round robin places the same in either world."""
    run = run_on_cluster(calibration_requests(), overrides_of("round_robin", cost_file))
    tokens = sum(outcome.output_tokens for outcome in run.outcomes)
    return {"step_s": sum(run.step_s.values()), "tokens": tokens, "other_cpu_s": run.other_cpu_s}


def overhead_s(calibration: Mapping[str, Any], cost_file: Path, cost: StepCost) -> float:
    """Overheads.token_s: what its steps took beyond the simulated ones, for each token."""
    overrides = overrides_of("round_robin", cost_file)
    _, simulated_s = simulate(calibration_requests(), overrides, cost, Overheads())
    return round(max(0.0, float(calibration["step_s"]) - simulated_s) / int(calibration["tokens"]), 6)


def measure(policy: str, rate: float, num_requests: int, seed: int, cost_file: Path) -> dict[str, Any]:
    run = run_on_cluster(make_requests(rate, num_requests, seed), overrides_of(policy, cost_file))
    row = {"policy": policy, "rate": rate, "requests": num_requests, "seed": seed, "late_s": run.late_s}
    row["groups"] = "".join(outcome.group[-1] for outcome in run.outcomes)  # where each request went
    return {**row, "real": figures(run.outcomes[NUM_WARM_UP:]) | {"step_s": sum(run.step_s.values())}}


def predict(row: Mapping[str, Any], cost_file: Path, cost: StepCost, token_s: float) -> dict[str, Any]:
    """Means over the variants, and the mean latency of each."""
    workload, overrides = (
        make_requests(row["rate"], row["requests"], row["seed"]),
        overrides_of(row["policy"], cost_file),
    )
    found = []
    for network_s, event_lag_s, factor in VARIANTS:
        overheads = Overheads(token_s=factor * token_s, network_s=network_s, event_lag_s=event_lag_s)
        outcomes, busy_s = simulate(workload, overrides, cost, overheads)
        found.append(figures(outcomes[NUM_WARM_UP:]) | {"step_s": busy_s})
    means = {name: statistics.mean(variant[name] for variant in found) for name in found[0]}
    return {"simulated": means, "variant_latencies_s": [variant["latency_mean_s"] for variant in found]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", type=Path, required=True, help="a file of `preble-jax profile` of this machine")
    parser.add_argument("--policies", nargs="+", default=["round_robin", "e2", "default"])
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--requests", type=int, default=NUM_REQUESTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    out, cost_file, cost = arguments.json, arguments.cost.absolute(), find_cost(str(arguments.cost))
    document: dict[str, Any] = {"rows": []}
    if out is not None and out.exists():
        document = json.loads(out.read_text())

    def save() -> None:
        if out is not None:
            out.write_text(json.dumps(document, indent=1) + "\n")

    if "calibration" not in document:
        document |= {"calibration": calibrate(cost_file), "machine": describe_machine()}
        print(f"calibration: {document['calibration']}", flush=True)
        save()
    # All policies of a rate after one another, so that a machine that drifts does so for all.
    for rate, policy in itertools.product(arguments.rates, arguments.policies):
        asked = {"policy": policy, "rate": rate, "requests": arguments.requests, "seed": arguments.seed}
        if not any(asked.items() <= row.items() for row in document["rows"]):
            document["rows"].append(measure(policy, rate, arguments.requests, arguments.seed, cost_file))
            print(f"{rate:g}/s {policy}: {document['rows'][-1]['real']}", flush=True)
            save()
    token_s = overhead_s(document["calibration"], cost_file, cost)
    for row in document["rows"]:
        row |= predict(row, cost_file, cost, token_s)
    document |= {"token_s": token_s, "variants": VARIANTS, "comparison": compare(document["rows"])}
    show(document["rows"], document["comparison"])
    save()


if __name__ == "__main__":
    main()
