"""What planning a step costs a device group with a long queue, for each queue policy.

ToolBench-shaped prompts (600 tokens shared by all, 960 per tool with Zipf 1.3 over 2,000 tools, 275 own) of 100
tenants (Zipf 1.1); pages of 16 tokens, as many as the paper's groups have (198,516 tokens). 10,000 requests wait; every
one that ends is replaced before the next step. A fake device answers; pages are committed and evicted at every step, so
that the prefix tree never stands still. Only `schedule()` is timed for the first columns, only `settle()` for the last.
The first of all steps finds 10,000 new requests at once. Maxima are pauses of Python's garbage collector, or of the
machine's.

    python benchmarks/local_queue.py [--waiting 10000] [--steps 1500] [--tenants 100] [--policies dlpm vtc] [--json OUT]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import random
import time
from pathlib import Path
from typing import Any

from preble_jax.config import QueueSettings
from preble_jax.kv.prefix_cache import PrefixCache
from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams
from preble_jax.sched.limits import StepLimits
from preble_jax.sched.local_scheduler import LocalScheduler
from preble_jax.sched.queues import make_queue

POLICIES = ("dlpm", "fair", "fcfs", "lpm", "priority_groups", "vtc")
PAGE_SIZE, NUM_PAGES = 16, 198_516 // 16
SHARED, TOOL, OWN, NUM_TOOLS, ZIPF = 600, 960, 275, 2_000, 1.3
TENANT_ZIPF, OUTPUT_TOKENS = 1.1, 43
LIMITS = StepLimits(
    vocab_size=1 << 20,
    max_model_len=4096,
    prefill_tokens=2048,
    max_prefill_seqs=16,
    max_num_seqs=64,
    max_waiting=1 << 20,
)


class Arrivals:
    """Requests of the workload, one after the other."""

    def __init__(self, num_tenants: int, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._tools = list(itertools.accumulate(rank**-ZIPF for rank in range(1, NUM_TOOLS + 1)))
        self._tenants = list(itertools.accumulate(rank**-TENANT_ZIPF for rank in range(1, num_tenants + 1)))
        self._number = itertools.count()

    def next(self) -> Request:
        number = next(self._number)
        (tool,) = self._random.choices(range(NUM_TOOLS), cum_weights=self._tools)
        (tenant,) = self._random.choices(range(len(self._tenants)), cum_weights=self._tenants)
        own = self._random.randrange(1 << 20)
        return Request(
            request_id=str(number),
            prompt_token_ids=[0] * SHARED + [1 + tool] * TOOL + [own] * OWN,
            sampling=SamplingParams(max_tokens=self._random.randrange(1, 2 * OUTPUT_TOKENS)),
            tenant=f"tenant-{tenant}",
        )


def run(policy: str, num_waiting: int, num_steps: int, num_tenants: int) -> dict[str, Any]:
    scheduler = LocalScheduler(LIMITS, PrefixCache(NUM_PAGES, PAGE_SIZE), make_queue(QueueSettings(policy=policy)))
    arrivals = Arrivals(num_tenants)
    planned, cpu, settled, changed_steps, finished = [], [], [], 0, 0
    for step in range(num_steps):
        while scheduler.num_waiting < num_waiting:
            scheduler.add(arrivals.next(), float(step))
        start, start_cpu = time.perf_counter(), time.thread_time()
        plan = scheduler.schedule(float(step))
        planned.append(time.perf_counter() - start)
        cpu.append(time.thread_time() - start_cpu)
        assert plan is not None
        tokens = [[step]] * len(plan.rows)
        start = time.perf_counter()
        scheduler.started(plan)
        outputs = scheduler.settle(plan, tokens, [[0.0]] * len(tokens))
        settled.append(time.perf_counter() - start)
        finished += sum(output.finished for output in outputs)
        changed_steps += scheduler.cache.events.take() is not None
    return {
        "policy": policy,
        "plan_median_ms": quantile_ms(planned, 0.5),
        "plan_p99_ms": quantile_ms(planned, 0.99),
        "plan_max_ms": quantile_ms(planned, 1.0),
        "plan_cpu_p99_ms": quantile_ms(cpu, 0.99),
        "settle_median_ms": quantile_ms(settled, 0.5),
        "settle_p99_ms": quantile_ms(settled, 0.99),
        "steps_that_changed_the_tree": changed_steps / num_steps,
        "finished": finished,
        "cached_share": scheduler.num_cached_tokens / scheduler.num_prompt_tokens,
        "preemptions": scheduler.num_preemptions,
    }


def quantile_ms(seconds: list[float], share: float) -> float:
    return round(1e3 * sorted(seconds)[min(int(share * len(seconds)), len(seconds) - 1)], 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--tenants", type=int, default=100)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for policy in arguments.policies:
        row = run(policy, arguments.waiting, arguments.steps, arguments.tenants)
        rows.append(row)
        print(
            f"{policy:15} plan {row['plan_median_ms']:.3f} ms, p99 {row['plan_p99_ms']:.3f} ms "
            f"({row['plan_cpu_p99_ms']:.3f} ms of CPU), max {row['plan_max_ms']:.1f} ms; "
            f"settle {row['settle_median_ms']:.3f} ms, p99 {row['settle_p99_ms']:.3f} ms; "
            f"tree changed in {row['steps_that_changed_the_tree']:.0%} of steps; "
            f"{row['cached_share']:.0%} of prompts cached, {row['finished']} finished",
            flush=True,
        )
        gc.collect()  # one policy's garbage is not the next one's pause
    worst = max(row["plan_p99_ms"] for row in rows)
    print(f"{arguments.waiting} waiting: p99 of planning a step is at most {worst:.3f} ms")
    if arguments.json:
        result = {
            "waiting": arguments.waiting,
            "steps": arguments.steps,
            "tenants": arguments.tenants,
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
            "policies": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
