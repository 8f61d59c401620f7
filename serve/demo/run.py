"""Runs the demonstration: `preble-jax demo`."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from preble_jax.errors import PrebleError
from preble_jax.sampling_params import SamplingParams
from serve.client import AsyncClient
from serve.cluster import Cluster, new_run_dir
from serve.demo.requests import DemoRequest, load_requests
from serve.demo.summary import Outcome, Summary, summarize, summary_table
from serve.demo.view import View, make_view
from serve.output_file import require_writable, write_file
from serve.protos.preble.v1 import scheduler_pb2 as pb
from serve.protos.preble.v1 import scheduler_pb2_grpc
from serve.status import transport_errors
from serve.transport import open_channel

ARRIVAL_GAP_S = 0.1
VIEW_S = 0.2
STATE_TIMEOUT_S = 2.0
# The demonstration gets ports of its own, so that it runs beside a deployment that is up.
ANY_PORT = {"serve.frontend_port": "0", "serve.scheduler_port": "0", "serve.worker_port": "0"}


def run_demo(arguments: argparse.Namespace) -> int:
    """Exit status: 0 if no request failed."""
    require_writable("--json", arguments.json)
    console = Console()
    requests = load_requests(arguments.seed)
    num_families = len({request.family for request in requests})
    sampling = SamplingParams(max_tokens=arguments.max_tokens, temperature=0.0)
    run_dir: Path = arguments.run_dir or new_run_dir()
    summaries = []
    for cluster in _clusters(arguments, run_dir):
        config = cluster.config
        console.print(
            f"{len(requests)} requests in {num_families} prefix families, placement {config.sched.policy}, "
            f"local queue {config.queue.policy}",
            highlight=False,
        )
        with cluster:
            summaries.append(asyncio.run(_measure(cluster, requests, sampling, make_view(console))))
    try:
        if arguments.json is not None:
            write_file("--json", arguments.json, json.dumps(_document(summaries), indent=2) + "\n")
    finally:
        console.print(summary_table(summaries))
    return 0 if all(summary.failures == 0 for summary in summaries) else 1


def _clusters(arguments: argparse.Namespace, run_dir: Path) -> list[Cluster]:
    """None is started yet. To compare is to run the same from empty caches under each placement."""
    overrides = {**ANY_PORT, **arguments.overrides}
    if not arguments.compare:
        return [Cluster(arguments.config, overrides, run_dir=run_dir)]
    return [
        Cluster(arguments.config, {**overrides, "sched.placement": placement}, run_dir=run_dir / placement)
        for placement in ("default", "round_robin")
    ]


def _document(summaries: Sequence[Summary]) -> dict[str, object]:
    """The first run's figures; the others beside them under their placement's name."""
    first, *others = (summary.to_json() for summary in summaries)
    return {**first, "compare": {other["placement"]: other for other in others}} if others else first


async def _measure(cluster: Cluster, requests: Sequence[DemoRequest], sampling: SamplingParams, view: View) -> Summary:
    outcomes = [Outcome(index=request.index, family=request.family) for request in requests]
    started = time.monotonic()
    async with AsyncClient(cluster.frontend_address) as client, open_channel(cluster.scheduler_address) as channel:
        scheduler = scheduler_pb2_grpc.SchedulerStub(channel)
        with view:
            watcher = asyncio.create_task(_watch(scheduler, outcomes, view))
            await stream_all(client, requests, outcomes, sampling, view)
            duration_s = time.monotonic() - started
            watcher.cancel()
        state = await scheduler.GetState(pb.GetStateRequest(), timeout=STATE_TIMEOUT_S)
    return summarize(outcomes, state, duration_s)


async def stream_all(
    client: AsyncClient,
    requests: Sequence[DemoRequest],
    outcomes: Sequence[Outcome],
    sampling: SamplingParams,
    view: View,
) -> None:
    """Sends the requests one shortly after the other, and returns when all have ended."""
    async with asyncio.TaskGroup() as streams:
        for request, outcome in zip(requests, outcomes, strict=True):
            streams.create_task(_ask(client, request, outcome, sampling, view))
            await asyncio.sleep(ARRIVAL_GAP_S)


async def _ask(
    client: AsyncClient, request: DemoRequest, outcome: Outcome, sampling: SamplingParams, view: View
) -> None:
    """Streams one answer into `outcome`. A failure is an outcome too."""
    started = time.monotonic()
    try:
        async for chunk in client.stream(request.prompt, sampling):
            if outcome.ttft_s is None and chunk.token_ids:
                outcome.ttft_s = time.monotonic() - started
            outcome.text += chunk.text
            if chunk.usage is not None:
                outcome.usage = chunk.usage
    except PrebleError as error:
        outcome.error = str(error)
    outcome.latency_s = time.monotonic() - started
    view.ended(outcome)


async def _watch(scheduler: scheduler_pb2_grpc.SchedulerStub, outcomes: Sequence[Outcome], view: View) -> None:
    """Keeps the view fresh until cancelled. A scheduler that does not answer leaves the last state standing."""
    state = pb.GetStateResponse()
    while True:
        with suppress(PrebleError), transport_errors():
            state = await scheduler.GetState(pb.GetStateRequest(), timeout=STATE_TIMEOUT_S)
        view.update(outcomes, state)
        await asyncio.sleep(VIEW_S)
