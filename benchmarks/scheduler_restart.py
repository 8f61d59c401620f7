"""The scheduler is killed with SIGKILL under load and started again: how long until hits are what they were.

    python benchmarks/scheduler_restart.py [--rounds 3] [--json OUT]

Two device groups with the default model serve prompts of FAMILIES families that share their first 300 tokens or so, at
a steady rate. The pages of all families do not fit into one group, so that it matters who is sent where. After WARM_S
the scheduler is killed, after DOWN_S a new one is started at the same address. Frontends place by hashing meanwhile;
the workers send snapshots to the new one. Times count from the start of the new process. "Full hit ratio": of the
requests sent from then on, over WINDOW_S, the share of cached prompt tokens is that before the kill, less 2%. It may
come before all groups have rejoined: hashing moves a family to another group once, and hits there from then on, as long
as the pages suffice. At RATE requests a second a window holds a dozen: one miss is 8% of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preble_jax.bench.machine import processor
from preble_jax.errors import PrebleError
from preble_jax.progress import NullProgress
from preble_jax.sampling_params import SamplingParams
from serve.client import AsyncClient
from serve.cluster import Cluster
from serve.protos.preble.v1 import scheduler_pb2 as pb
from serve.protos.preble.v1 import scheduler_pb2_grpc
from serve.status import transport_errors
from serve.transport import open_channel

SETTINGS = {
    "kv.num_pages": "160",
    "engine.max_num_seqs": "4",
    "engine.prefill_buckets": "64,256",
    "serve.frontend_port": "0",
    "serve.scheduler_port": "0",
    "serve.worker_port": "0",
}
FAMILIES, RATE = 8, 4.0
WARM_S, DOWN_S, AFTER_S, WINDOW_S = 15.0, 3.0, 12.0, 3.0
SAMPLING = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


@dataclass
class Sent:
    """sent_s: on this process's clock. hit_ratio: None when it failed."""

    sent_s: float
    hit_ratio: float | None = None


class Run:
    """One cluster, one kill."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self._cluster = cluster
        self._random = random.Random(seed)
        self.sent: list[Sent] = []

    async def measure(self) -> dict[str, Any]:
        async with AsyncClient(self._cluster.frontend_address) as client, asyncio.TaskGroup() as requests:
            load = requests.create_task(self._load(client, requests))
            await asyncio.sleep(WARM_S)
            held = await self._held_pages()
            killed_s = time.perf_counter()
            self._cluster.children["scheduler"].process.send_signal(signal.SIGKILL)
            await asyncio.sleep(DOWN_S)
            started_s = time.perf_counter()
            self._cluster.restart_scheduler()
            answered_s, rejoined_s = await self._until_back(held)
            await asyncio.sleep(max(0.0, started_s + AFTER_S - time.perf_counter()))
            load.cancel()
        before = self._hit_ratio(killed_s - 2 * WINDOW_S, killed_s)
        full_s = next(
            (
                request.sent_s
                for request in self.sent
                if request.sent_s >= started_s
                and self._hit_ratio(request.sent_s, request.sent_s + WINDOW_S) >= before - 0.02
            ),
            None,
        )
        return {
            "requests": len(self.sent),
            "lost": sum(request.hit_ratio is None for request in self.sent),
            "answered_s": answered_s - started_s,
            "rejoined_s": rejoined_s - started_s,
            "full_hit_ratio_s": None if full_s is None else full_s - started_s,
            "hit_ratio_before": before,
            "hit_ratio_without": self._hit_ratio(killed_s, started_s),
            "hit_ratio_after": self._hit_ratio(rejoined_s, started_s + AFTER_S),
        }

    async def _load(self, client: AsyncClient, requests: asyncio.TaskGroup) -> None:
        number = 0
        while True:
            number += 1
            requests.create_task(self._ask(client, self._random.randrange(FAMILIES), number))
            await asyncio.sleep(1 / RATE)

    async def _ask(self, client: AsyncClient, family: int, number: int) -> None:
        request = Sent(time.perf_counter())
        self.sent.append(request)
        prompt = f"Family {family}: " + f"all {family} of them begin alike, and go on like this. " * 20 + str(number)
        try:
            usage = (await client.generate(prompt, SAMPLING)).usage
        except PrebleError:
            return
        request.hit_ratio = usage.cached_tokens / usage.prompt_tokens

    def _hit_ratio(self, start_s: float, end_s: float) -> float:
        ratios = [r.hit_ratio for r in self.sent if start_s <= r.sent_s < end_s and r.hit_ratio is not None]
        return statistics.fmean(ratios) if ratios else 0.0

    async def _held_pages(self) -> dict[str, int]:
        """By group, of those that have joined; empty while no scheduler answers."""
        async with open_channel(self._cluster.scheduler_address) as channel:
            try:
                with transport_errors():
                    state = await scheduler_pb2_grpc.SchedulerStub(channel).GetState(pb.GetStateRequest(), timeout=1.0)
            except PrebleError:
                return {}
        # The scheduler answers before anybody has joined.
        return {"": 0, **{group.hello.group.group: group.held_pages for group in state.groups}}

    async def _until_back(self, held: dict[str, int]) -> tuple[float, float]:
        """When the new scheduler answered, and when it knew all groups and at least half of their pages."""
        answered_s = None
        while True:
            now = await self._held_pages()
            if now and answered_s is None:
                answered_s = time.perf_counter()
            if answered_s and all(now.get(group, -1) >= pages / 2 for group, pages in held.items()):
                return answered_s, time.perf_counter()
            await asyncio.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    rounds = []
    for number in range(arguments.rounds):
        with Cluster(None, SETTINGS, progress=NullProgress(), echo=lambda line: None) as cluster:
            rounds.append(asyncio.run(Run(cluster, number).measure()))
        print(f"round {number + 1}: " + ", ".join(f"{k} {_number(v)}" for k, v in rounds[-1].items()), flush=True)
    median = {
        name: statistics.median([row[name] for row in rounds if row[name] is not None] or [float("nan")])
        for name in rounds[0]
    }
    print("median:  " + ", ".join(f"{name} {_number(value)}" for name, value in median.items()))
    if arguments.json is not None:
        document = {**median, "rounds": rounds, "settings": SETTINGS, "rate": RATE, "machine": processor()}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


def _number(value: float | None) -> str:
    return "never" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    main()
