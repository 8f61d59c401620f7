"""A simulator's workload on a real cluster: prompts of token ids made from its block ids, sent at its times."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from preble_jax.progress import NullProgress
from preble_jax.sampling_params import SamplingParams
from preble_jax.sim.request import SimRequest, Workload
from serve.client import AsyncClient
from serve.cluster import Cluster
from serve.protos.preble.v1 import scheduler_pb2 as pb
from serve.protos.preble.v1 import scheduler_pb2_grpc
from serve.transport import open_channel

ANY_PORT = {"serve.frontend_port": "0", "serve.scheduler_port": "0", "serve.worker_port": "0"}
_TOKENS = (100, 40_000)
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one request: seconds from sending to the first token and to the last, and what the group said."""

    ttft_s: float
    latency_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    group: str


@dataclass(frozen=True, kw_only=True)
class RealRun:
    """outcomes: in the workload's order. step_s: seconds in which all groups' steps ran, from each of the times that
    were asked for to the next one, or to the end. other_cpu_s: of the client, the frontend and the scheduler, which run
    on the workers' cores. late_s: the most by which a request was sent late.
    """

    outcomes: list[Outcome]
    step_s: list[float]
    other_cpu_s: float
    late_s: float


def prompt_tokens(request: SimRequest, index: int, block_size: int) -> list[int]:
    """Equal where the block ids are equal; beyond the blocks, the request's own."""
    tokens: list[int] = []
    for block in request.blocks:
        draw = random.Random(f"block {block}")
        tokens += [draw.randrange(*_TOKENS) for _ in range(block_size)]
    draw = random.Random(f"request {index}")
    tokens = tokens[: request.num_prompt]
    return tokens + [draw.randrange(*_TOKENS) for _ in range(request.num_prompt - len(tokens))]


def run_on_cluster(workload: Workload, overrides: Mapping[str, str], times_s: Sequence[float]) -> RealRun:
    """On a cluster of its own, with the default configuration and these overrides. No request may follow another.
    times_s: see RealRun.step_s; no step may run then, nor a report of steps be on its way."""
    assert all(request.follows is None for request in workload.requests)
    with Cluster(None, {**ANY_PORT, **overrides}, progress=NullProgress(), echo=lambda line: None) as cluster:
        pids = [child.process.pid for name, child in cluster.children.items() if not name.startswith("worker")]
        return asyncio.run(_run(workload, cluster, pids, times_s))


async def _run(workload: Workload, cluster: Cluster, pids: list[int], times_s: Sequence[float]) -> RealRun:
    prompts = [prompt_tokens(request, index, workload.block_size) for index, request in enumerate(workload.requests)]
    outcomes: list[Outcome | None] = [None] * len(prompts)
    late: list[float] = []

    async def ask(index: int, request: SimRequest, began: float) -> None:
        due = began + request.arrival_s
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        sent = time.perf_counter()
        late.append(sent - due)
        sampling = SamplingParams(max_tokens=request.num_output, temperature=0.0, ignore_eos=True)
        first, usage, num_output = 0.0, None, 0
        async for chunk in client.stream(prompts[index], sampling, tenant=request.tenant):
            first = first or time.perf_counter()
            num_output += len(chunk.token_ids)
            usage = chunk.usage or usage
        assert usage is not None
        outcomes[index] = Outcome(
            ttft_s=first - sent,
            latency_s=time.perf_counter() - sent,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            output_tokens=num_output,
            group=usage.group,
        )

    async def total_step_s(at_s: float) -> float:
        await asyncio.sleep(max(0.0, at_s - time.perf_counter()))
        state = await scheduler_pb2_grpc.SchedulerStub(channel).GetState(pb.GetStateRequest(), timeout=5.0)
        return sum(group.load.step_s for group in state.groups)

    async with AsyncClient(cluster.frontend_address) as client, open_channel(cluster.scheduler_address) as channel:
        cpu_s, began = _cpu_s(pids), time.perf_counter() + 0.5
        async with asyncio.TaskGroup() as tasks:
            totals = [tasks.create_task(total_step_s(began + time_s)) for time_s in times_s]
            for index, request in enumerate(workload.requests):
                tasks.create_task(ask(index, request, began))
        cpu_s = _cpu_s(pids) - cpu_s
        await asyncio.sleep(2 * cluster.config.serve.report_interval_s)  # the last load report
        step_s = [*(total.result() for total in totals), await total_step_s(0.0)]
    return RealRun(
        outcomes=[outcome for outcome in outcomes if outcome is not None],
        step_s=[after - before for before, after in itertools.pairwise(step_s)],
        other_cpu_s=cpu_s,
        late_s=max(late),
    )


def _cpu_s(pids: list[int]) -> float:
    """Of these processes and of this one."""
    total = time.process_time()
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) * _TICK_S
    return total
