"""Is the simulator true? The same requests on a real cluster of two workers and in the simulator, side by side.

    python benchmarks/paper/validation.py --cost profile.json [--policies round_robin e2 default] [--seeds 0 1] \\
        [--json OUT]

What OUT has measured already is not measured again: an interrupted command goes on where it was, and a finished one
simulates again beside the same real runs.

Real: SmolLM2 on the CPU, a core for each worker, everything started anew for each run; client, frontend and scheduler
run on the same cores. Simulated: the same deployment's settings, step costs from `preble-jax profile --output
profile.json` on the same machine, measured alone and beside a busy neighbour. Wanted: mean latency within 20%, hit
ratio within 3 points, the same ranking.

Two things are not in the profile. A machine is quicker at one time than at another: each run begins with prompts that
are not compared, one at a time; what their steps take, over what the profile says, is that run's `slowness`, by which
all costs are multiplied. And a worker's core has more to do than steps, with streams, client, frontend and scheduler:
how much, for each output token, is calibrated once, on a run of its own with other requests. Nothing else is fitted.

A placement may turn on milliseconds, and others follow from it: the simulator says what it says for VARIANTS of the
timing that cannot be told apart from outside. Their mean is compared; their range is printed beside it, and how often
each policy came first among them is in OUT. With several seeds, means over them are compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from real_cluster import Outcome, RealRun, run_on_cluster
from truth_table import compare, figures, over_seeds, show

from preble_jax.bench.machine import describe_machine
from preble_jax.config_files import load_config
from preble_jax.sim.cost.profiled import Crowding, ProfiledCost
from preble_jax.sim.request import SimRequest, Workload
from preble_jax.sim.settings import SimSettings
from preble_jax.sim.simulator import Simulator

# ToolBench's shape in small: a part that all share, a tool's, and the request's own.
SHARED_TOKENS, TOOL_TOKENS, OWN_TOKENS, OUTPUT_TOKENS = 240, 960, (32, 128), (8, 32)
NUM_TOOLS, ZIPF = 40, 0.8
NUM_REQUESTS, LATEST_S = 200, 0.5
# Before those: the first ones, which take longer, and from PACE_S on the prompts that the pace is told from.
NUM_FIRST, FIRST_INTERVAL_S = 4, 0.5
NUM_PACE, PACE_TOKENS, PACE_INTERVAL_S = 8, 1200, 1.2
PACE_S = (NUM_FIRST + 1) * FIRST_INTERVAL_S
START_S = PACE_S + NUM_PACE * PACE_INTERVAL_S
NUM_WARM_UP = NUM_FIRST + NUM_PACE
RATES = (2.4, 3.3, 4.2)
CALIBRATION_RATE, CALIBRATION_REQUESTS, CALIBRATION_SEED = 2.4, 60, 1_000
PAGE_SIZE, NUM_PAGES, NUM_GROUPS = 16, 1456, 2  # 23,296 tokens a worker: not all tools fit on one
# network_s, event_lag_s, and what the calibrated overhead is multiplied by.
VARIANTS = tuple(itertools.product((0.004, 0.01), (0.0, 0.02), (0.8, 1.0, 1.2)))


@dataclass(frozen=True, kw_only=True)
class Overheads:
    """slowness: what the profile's costs are multiplied by. token_s: that an output token lengthens the step that makes
    it by, beyond the profile. network_s: from client to group: protocol, hashing, placement. event_lag_s: of messages
    to the scheduler."""

    slowness: float = 1.0
    token_s: float = 0.0
    network_s: float = 0.006
    event_lag_s: float = 0.005

    def on_top_of(self, cost: ProfiledCost) -> ProfiledCost:
        crowding = cost.crowding
        if crowding is not None:
            crowding = Crowding(self.on_top_of(crowding.cost), crowding.num_neighbours)
        return ProfiledCost(
            name=cost.name,
            engine=cost.engine,
            steps=cost.steps.scaled(self.slowness).with_row(self.token_s),
            crowding=crowding,
        )


def make_requests(rate: float, num_requests: int, seed: int) -> Workload:
    """Poisson arrivals, behind NUM_WARM_UP requests that are not compared. What is a request's own has no blocks."""
    rng = random.Random(seed)
    weights = list(itertools.accumulate(rank**-ZIPF for rank in range(1, NUM_TOOLS + 1)))
    shared, tool_blocks = SHARED_TOKENS // PAGE_SIZE, TOOL_TOKENS // PAGE_SIZE
    requests = [
        *(SimRequest(arrival_s=FIRST_INTERVAL_S * i, num_prompt=200, num_output=8) for i in range(NUM_FIRST)),
        *(
            SimRequest(arrival_s=PACE_S + PACE_INTERVAL_S * i, num_prompt=PACE_TOKENS, num_output=1)
            for i in range(NUM_PACE)
        ),
    ]
    now = START_S
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
    workload: Workload, overrides: Mapping[str, str], cost: ProfiledCost, overheads: Overheads
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
        groups_per_host=NUM_GROUPS,
        decode_steps=config.engine.decode_steps,
        max_dispatch_s=config.engine.max_dispatch_s,
    )
    result = Simulator(settings, overheads.on_top_of(cost)).run(workload)
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


def measure(workload: Workload, overrides: Mapping[str, str]) -> tuple[RealRun, dict[str, Any]]:
    """pace_s: seconds of the steps that the pace is told from. step_s: of those behind them."""
    # A little before the next request; reports of the last one's steps have come.
    run = run_on_cluster(workload, overrides, (PACE_S - 0.1, START_S - 0.1))
    pace_s, step_s = run.step_s
    if run.late_s > LATEST_S:
        raise SystemExit(f"a request was sent {run.late_s:.1f} s late: the machine has other work; run it again")
    return run, {"pace_s": pace_s, "step_s": step_s, "late_s": run.late_s}


def calibrate(cost_file: Path) -> dict[str, Any]:
    """A real run of requests that are not compared. Round robin places the same in either world."""
    run, seconds = measure(calibration_requests(), overrides_of("round_robin", cost_file))
    tokens = sum(outcome.output_tokens for outcome in run.outcomes[NUM_WARM_UP:])
    return {**seconds, "tokens": tokens, "other_cpu_s": run.other_cpu_s}


def slowness(pace_s: float, cost_file: Path, cost: ProfiledCost) -> float:
    """What these steps took over what they take in the simulator."""
    workload = make_requests(1.0, 0, 0)
    first = replace(workload, requests=workload.requests[:NUM_FIRST])
    overrides = overrides_of("round_robin", cost_file)
    first_s, all_s = (simulate(part, overrides, cost, Overheads())[1] for part in (first, workload))
    return pace_s / (all_s - first_s)


def overhead_s(calibration: Mapping[str, Any], cost_file: Path, cost: ProfiledCost) -> float:
    """Overheads.token_s: with which the simulated steps of the calibration take as long as the real ones."""
    overrides, workload = overrides_of("round_robin", cost_file), calibration_requests()
    pace = slowness(calibration["pace_s"], cost_file, cost)
    warm_up = replace(workload, requests=workload.requests[:NUM_WARM_UP])

    def missing_s(token_s: float) -> float:
        overheads = Overheads(slowness=pace, token_s=token_s)
        all_s, before_s = (simulate(part, overrides, cost, overheads)[1] for part in (workload, warm_up))
        return float(calibration["step_s"]) - (all_s - before_s)

    low, high = 0.0, 0.01
    if missing_s(low) <= 0.0:
        return 0.0
    for _ in range(10):  # rows decode together or not: it is not a line
        middle = (low + high) / 2
        low, high = (middle, high) if missing_s(middle) > 0.0 else (low, middle)
    return round((low + high) / 2, 6)


def measure_row(policy: str, rate: float, num_requests: int, seed: int, cost_file: Path) -> dict[str, Any]:
    run, seconds = measure(make_requests(rate, num_requests, seed), overrides_of(policy, cost_file))
    row = {"policy": policy, "rate": rate, "requests": num_requests, "seed": seed, **seconds}
    row["groups"] = "".join(outcome.group[-1] for outcome in run.outcomes)  # where each request went
    row["ttft_s"] = [round(outcome.ttft_s, 4) for outcome in run.outcomes]
    row["latency_s"] = [round(outcome.latency_s, 4) for outcome in run.outcomes]
    return {**row, "real": figures(run.outcomes[NUM_WARM_UP:]) | {"step_s": run.step_s[-1]}}


def predict(row: Mapping[str, Any], cost_file: Path, cost: ProfiledCost, token_s: float) -> dict[str, Any]:
    """Means over the variants, and the mean latency of each."""
    workload, overrides = (
        make_requests(row["rate"], row["requests"], row["seed"]),
        overrides_of(row["policy"], cost_file),
    )
    pace = slowness(row["pace_s"], cost_file, cost)
    warm_up = replace(workload, requests=workload.requests[:NUM_WARM_UP])
    found = []
    for network_s, event_lag_s, factor in VARIANTS:
        overheads = Overheads(slowness=pace, token_s=factor * token_s, network_s=network_s, event_lag_s=event_lag_s)
        outcomes, busy_s = simulate(workload, overrides, cost, overheads)
        _, before_s = simulate(warm_up, overrides, cost, overheads)
        found.append(figures(outcomes[NUM_WARM_UP:]) | {"step_s": busy_s - before_s})
    means = {name: statistics.mean(variant[name] for variant in found) for name in found[0]}
    latencies = [variant["latency_mean_s"] for variant in found]
    return {"slowness": round(pace, 4), "simulated": means, "variant_latencies_s": latencies}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", type=Path, required=True, help="a file of `preble-jax profile` of this machine")
    parser.add_argument("--policies", nargs="+", default=["round_robin", "e2", "default"])
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--requests", type=int, default=NUM_REQUESTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    out, cost_file, cost = arguments.json, arguments.cost.absolute(), ProfiledCost.read(arguments.cost)
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
    for seed, rate, policy in itertools.product(arguments.seeds, arguments.rates, arguments.policies):
        asked = {"policy": policy, "rate": rate, "requests": arguments.requests, "seed": seed}
        if not any(asked.items() <= row.items() for row in document["rows"]):
            document["rows"].append(measure_row(policy, rate, arguments.requests, seed, cost_file))
            print(f"{rate:g}/s {policy}: {document['rows'][-1]['real']}", flush=True)
            save()
    token_s = overhead_s(document["calibration"], cost_file, cost)
    for row in document["rows"]:
        row |= predict(row, cost_file, cost, token_s)
    means = over_seeds(document["rows"])
    document |= {"token_s": token_s, "variants": VARIANTS, "means": means, "comparison": compare(means)}
    document["command"] = f"benchmarks/paper/validation.py --cost {arguments.cost}"
    if arguments.seeds != parser.get_default("seeds"):
        document["command"] += f" --seeds {' '.join(map(str, arguments.seeds))}"
    show(means, document["comparison"])
    save()


if __name__ == "__main__":
    main()
