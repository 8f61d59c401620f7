"""How long a modest tenant waits behind a flood: D2LPM and DLPM against first come, first served, on real workers.

    python benchmarks/fairness_cluster.py [--rounds 3] [--json OUT]

A cluster of two device groups with the default model is started anew for every run, the policies in turn. In a run the
greedy tenant keeps GREEDY_CALLERS requests waiting or running, all the time; the modest one sends its requests one by
one. Printed is the median latency of each tenant, and the ratios of medians in runs that followed each other.

d2lpm+fcfs differs from the fair policies in the queue alone, e2+fcfs in the placement too. Read the greedy tenant's
ratio beside the modest one's: DLPM also reorders by prefix within a tenant, and callers that are served early ask more
often, so that the greedy tenant's median falls without its being served faster on the whole.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path

from preble_jax.bench.machine import processor
from preble_jax.progress import NullProgress
from preble_jax.sampling_params import SamplingParams
from serve.client import AsyncClient
from serve.cluster import Cluster

COMMON = {
    "engine.max_num_seqs": "4",
    "engine.prefill_buckets": "64,256",
    "serve.frontend_port": "0",
    "serve.scheduler_port": "0",
    "serve.worker_port": "0",
}
D2LPM = {"sched.placement": "d2lpm", "sched.d2lpm_quantum_tokens": "256"}
# A quantum of dlpm is about one request here: 20 tokens to compute, 16 of output.
POLICIES = {
    "d2lpm+dlpm": {**D2LPM, "queue.policy": "dlpm", "queue.dlpm_quantum": "64"},
    "d2lpm+fcfs": {**D2LPM, "queue.policy": "fcfs"},
    "e2+fcfs": {"sched.placement": "e2", "queue.policy": "fcfs"},
}
FAIR, *OTHERS = POLICIES
GREEDY_CALLERS, NUM_MODEST = 48, 6
SAMPLING = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)


async def flood(address: str) -> dict[str, list[float]]:
    """Seconds of each request, by tenant."""
    latencies: dict[str, list[float]] = {"greedy": [], "modest": []}
    async with AsyncClient(address) as client, asyncio.TaskGroup() as requests:

        async def ask(tenant: str, number: int) -> None:
            prompt = f"{tenant} {number % 12}: " + "what a tenant asks again and again, " * 12 + str(number)
            start = time.perf_counter()
            await client.generate(prompt, SAMPLING, tenant=tenant)
            latencies[tenant].append(time.perf_counter() - start)

        async def ask_on(caller: int) -> None:
            number = caller
            while not all_asked:
                await ask("greedy", number)
                number += GREEDY_CALLERS

        all_asked = False
        for caller in range(GREEDY_CALLERS):
            requests.create_task(ask_on(caller))
        await asyncio.sleep(1.0)
        for number in range(NUM_MODEST):
            await ask("modest", number)
        all_asked = True
    return latencies


def run(policies: str) -> dict[str, float]:
    """Median latency in seconds, by tenant, on a cluster of its own."""
    with Cluster(None, {**COMMON, **POLICIES[policies]}, progress=NullProgress(), echo=lambda line: None) as cluster:
        latencies = asyncio.run(flood(cluster.frontend_address))
    return {tenant: statistics.median(seconds) for tenant, seconds in latencies.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {policies: [] for policies in POLICIES}
    for number in range(arguments.rounds):
        for policies in list(POLICIES)[:: 1 if number % 2 == 0 else -1]:
            medians = run(policies)
            runs[policies].append(medians)
            shown = ", ".join(f"{tenant} {seconds:.2f} s" for tenant, seconds in medians.items())
            print(f"round {number + 1}, {policies}: median latency {shown}", flush=True)
    ratios: dict[str, dict[str, list[float]]] = {}
    for other in OTHERS:
        pairs = list(zip(runs[other], runs[FAIR], strict=True))
        ratios[other] = {tenant: [slow[tenant] / fast[tenant] for slow, fast in pairs] for tenant in pairs[0][0]}
        for tenant, found in ratios[other].items():
            spread = f"{min(found):.2f} .. {max(found):.2f}"
            print(f"latency of the {tenant} tenant, {other} over {FAIR}: {statistics.median(found):.2f} ({spread})")
    if arguments.json is not None:
        document = {"ratios": ratios, "median_latency_s": runs, "policies": POLICIES}
        document |= {"greedy_callers": GREEDY_CALLERS, "modest_requests": NUM_MODEST, "machine": processor()}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
