"""Place over gRPC: a scheduler process on one core, a client on another.

A child process runs `preble-jax scheduler`, confined to core 0; this one, on core 1, plays four device groups and a
frontend. Three ways to ask: one call a request; batches on a stream, made beforehand; and the frontend's own
`serve.placer.Placer`, which coalesces requests that ask one by one, and reports each finished.

What was expected before anything was measured: 3,500 a second for calls, because grpc.aio was known to cost 150 to 200
microseconds a call and deciding 60; 14,000 for batches, bounded by deciding and unpacking hashes. Found (2 EPYC cores):
a handler that does nothing takes 155 us a call, the scheduler's 260. Half of that is the kernel, switching threads: on
one core each call costs some 17 switches between the event loop and gRPC's own threads, and a handler that takes longer
spreads a call's events over more of them. Deciding is 50 us; unpacking a repeated field of 114 hashes was 15 and is now
1.3 (one `struct` call over a packed field). Tried, and worth too little to keep: SCHED_BATCH (1%), longer and shorter
GIL intervals (0), a rarer collector (2%), uvloop (6%, and 15% of a handler that does nothing). Batches share the 200 us
of a message among 64 placements, and are bounded by deciding.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from toolbench import GROUP_PAGES, OUTPUT_TOKENS, PAGE_SIZE, prompts

from serve import wire
from serve.placer import Placer
from serve.protos.preble.v1 import scheduler_pb2 as pb
from serve.protos.preble.v1 import scheduler_pb2_grpc
from serve.transport import open_channel

NUM_GROUPS = 4
BATCH = 64
BATCHES_ON_THEIR_WAY = 4
UNARY_CALLERS = 16
COALESCED_CALLERS = 256

Stub = scheduler_pb2_grpc.SchedulerStub
Requests = Sequence[pb.PlaceRequest]
Way = Callable[[Stub, Requests], Awaitable[None]]


async def unary(stub: Stub, requests: Requests) -> None:
    waiting = iter(requests)

    async def caller() -> None:
        for request in waiting:
            await stub.Place(request)

    await asyncio.gather(*(caller() for _ in range(UNARY_CALLERS)))


async def batched(stub: Stub, requests: Requests) -> None:
    stream = stub.PlaceStream()
    batches = [pb.PlaceBatch(requests=requests[i : i + BATCH]) for i in range(0, len(requests), BATCH)]
    for number, batch in enumerate(batches):
        await stream.write(batch)
        if number >= BATCHES_ON_THEIR_WAY:
            _check(await stream.read())
    for _ in batches[:BATCHES_ON_THEIR_WAY]:
        _check(await stream.read())
    stream.cancel()


async def coalesced(stub: Stub, requests: Requests) -> None:
    """Placed and reported finished, by the frontend's own means."""
    waiting = iter(requests)
    async with Placer(stub) as placer:

        async def caller() -> None:
            for request in waiting:
                await placer.place(request)
                placer.finished(pb.FinishedRequest(request_id=request.request_id, output_tokens=OUTPUT_TOKENS))

        await asyncio.gather(*(caller() for _ in range(COALESCED_CALLERS)))


def _check(response: pb.PlaceBatchResponse) -> None:
    assert all(result.WhichOneof("result") == "placement" for result in response.results)


async def rounds(way: Way, num_rounds: int, num_requests: int) -> tuple[list[float], float]:
    """(placements/s of each round, CPU microseconds of the scheduler per placement)."""
    rates = []
    async with _scheduler() as (pid, stub):
        await way(stub, _messages(1_000, 0))  # warm
        before = _cpu_s(pid)
        for index in range(num_rounds):
            requests = _messages(num_requests, 1_000 + index * num_requests)
            start = time.perf_counter()
            await way(stub, requests)
            rates.append(num_requests / (time.perf_counter() - start))
        cpu_us = (_cpu_s(pid) - before) / (num_rounds * num_requests) * 1e6
    return rates, cpu_us


def _messages(num_requests: int, first: int) -> Requests:
    return [
        pb.PlaceRequest(
            request_id=request.request_id,
            block_hashes=wire.hashes_to_bytes(request.block_hashes),
            num_tokens=request.num_tokens,
            max_tokens=request.max_tokens,
            tenant=request.tenant,
        )
        for request in prompts(num_requests, first)
    ]


@asynccontextmanager
async def _scheduler() -> AsyncIterator[tuple[int, Stub]]:
    """(pid, stub) of a scheduler with NUM_GROUPS groups that say nothing and are not missed for it."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "address"
        command = f"scheduler --port 0 --address-file {file} --exit-with-parent --config.sched.group_timeout_s=1e6"
        child = subprocess.Popen(
            [sys.executable, "-m", "serve.cli", *command.split()],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, cores[:1]),
        )
        os.sched_setaffinity(0, cores[1:] or cores)
        try:
            while not file.exists():
                assert child.poll() is None, "the scheduler did not start"
                time.sleep(0.02)
            async with open_channel(file.read_text()) as channel:
                stub = Stub(channel)
                links = [await _join(stub, f"worker-{index}") for index in range(NUM_GROUPS)]
                yield child.pid, stub
                for link in links:
                    link.cancel()
        finally:
            os.sched_setaffinity(0, cores)
            child.terminate()
            child.wait()


async def _join(stub: Stub, group: str) -> object:
    link = stub.Connect()
    address = pb.GroupAddress(group=group, address="127.0.0.1:50060")
    hello = pb.Hello(group=address, page_size=PAGE_SIZE, num_pages=GROUP_PAGES, generation=1)
    await link.write(pb.WorkerMessage(hello=hello))
    await link.read()  # the wish for a snapshot: the group is known
    return link


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    for way in (unary, batched, coalesced):
        rates, cpu_us = asyncio.run(rounds(way, 3, 6_000))
        shown = " ".join(f"{rate:8,.0f}" for rate in rates)
        print(f"{way.__name__:10} {shown} /s, scheduler {cpu_us:.0f} us of CPU each")
