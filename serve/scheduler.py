"""The global scheduler's process: gRPC around `preble_jax.sched.GlobalScheduler`. Never imports JAX.

All decisions are that object's; here are the clock, the links to the workers, and the wire. Everything runs on one
event loop and no handler awaits in the middle of a change, so there are no locks.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import grpc

from preble_jax.config import Config
from preble_jax.cost_file import COSTS
from preble_jax.errors import GroupUnavailableError, InvalidRequestError, PrebleError
from preble_jax.sched import (
    GlobalScheduler,
    GroupLost,
    GroupStats,
    Instruction,
    Placement,
    PlaceRequest,
    RequestSnapshot,
)
from preble_jax.sched.cost import LinearCostModel
from preble_jax.sched.step_fit import StepTotals
from serve import wire
from serve.protos.preble.v1 import scheduler_pb2 as pb
from serve.protos.preble.v1 import scheduler_pb2_grpc
from serve.status import answers_errors, error_name
from serve.transport import Server, announce, stop_event

SERVICE = pb.DESCRIPTOR.services_by_name["Scheduler"].full_name
TICK_S = 0.25

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Link:
    """One worker's stream. `pending`: what to tell the worker when it speaks next, which it does every fraction of a
    second."""

    hello: pb.Hello
    load: pb.GroupLoad = field(default_factory=pb.GroupLoad)
    pending: list[pb.SchedulerMessage] = field(default_factory=list)

    @property
    def group(self) -> str:
        return self.hello.group.group

    def ask_snapshot(self) -> None:
        self.pending.append(pb.SchedulerMessage(snapshot_request=pb.SnapshotRequest()))


class SchedulerServicer(scheduler_pb2_grpc.SchedulerServicer):
    """clock: seconds, monotonic; the scheduler's `now`."""

    def __init__(self, scheduler: GlobalScheduler, page_size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._scheduler = scheduler
        self._page_size = page_size
        self._clock = clock
        self._links: dict[str, _Link] = {}

    @answers_errors
    async def Place(self, request: pb.PlaceRequest, context: grpc.aio.ServicerContext) -> pb.PlaceResponse:
        response = pb.PlaceResponse()
        self._write(self._scheduler.place(self._read(request), self._clock()), response)
        return response

    @answers_errors
    async def PlaceStream(
        self, request_iterator: AsyncIterator[pb.PlaceBatch], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.PlaceBatchResponse]:
        async for batch in request_iterator:
            yield self._place_batch(batch)

    def _place_batch(self, batch: pb.PlaceBatch) -> pb.PlaceBatchResponse:
        """One request's error is its own answer, and nobody else's business."""
        now, response = self._clock(), pb.PlaceBatchResponse()
        self._hear_reports(batch, now, response)
        results, place = response.results, self._scheduler.place
        for request in batch.requests:
            result = results.add()
            try:
                placement = place(self._read(request), now)
            except Exception as error:
                result.error.CopyFrom(_place_error(error))
            else:
                self._write(placement, result.placement)
        return response

    def _hear_reports(self, batch: pb.PlaceBatch, now: float, response: pb.PlaceBatchResponse) -> None:
        reports = (*batch.first_tokens, *batch.finished)
        for report in reports:
            try:
                if isinstance(report, pb.FirstToken):
                    queue_s = report.queue_s if report.HasField("queue_s") else None
                    self._scheduler.first_token(report.request_id, now, queue_s)
                else:
                    self._finish(report, now)
            except Exception as error:
                response.report_errors.append(_place_error(error))

    def _read(self, request: pb.PlaceRequest) -> PlaceRequest:
        """A group is excluded for as long as the process that failed the request is the one behind it."""
        links = self._links
        excluded = [
            failed.group
            for failed in request.excluded
            if (link := links.get(failed.group)) is not None and link.hello.generation == failed.generation
        ]
        return wire.place_request_from_proto(request, excluded)

    def _write(self, placement: Placement, response: pb.PlaceResponse) -> None:
        """In place: nested messages given to a constructor are copied once a level."""
        links = self._links
        hello = links[placement.group].hello
        response.group.CopyFrom(hello.group)
        response.generation = hello.generation
        response.alternatives.extend([links[group].hello.group for group in placement.alternatives])
        response.decision = placement.decision
        response.matched_tokens = placement.matched_tokens

    @answers_errors
    async def Finished(self, request: pb.FinishedRequest, context: grpc.aio.ServicerContext) -> pb.FinishedResponse:
        self._finish(request, self._clock())
        return pb.FinishedResponse()

    def _finish(self, report: pb.FinishedRequest, now: float) -> None:
        self._scheduler.finished(
            report.request_id, report.output_tokens, report.cached_tokens, now, failed=report.failed
        )

    @answers_errors
    async def Connect(
        self, request_iterator: AsyncIterator[pb.WorkerMessage], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.SchedulerMessage]:
        link: _Link | None = None
        try:
            async for message in request_iterator:
                if link is None:
                    link = self._join(message)
                else:
                    self._hear(link, message)
                for answer in link.pending:
                    yield answer
                link.pending.clear()
        finally:
            if link is not None:
                self._leave(link)

    @answers_errors
    async def GetState(self, request: pb.GetStateRequest, context: grpc.aio.ServicerContext) -> pb.GetStateResponse:
        stats, policy = self._scheduler.stats(), self._scheduler.policy_stats()
        return pb.GetStateResponse(
            groups=[self._group_state(link, stats[group]) for group, link in sorted(self._links.items())],
            placement=self._scheduler.settings.policy,
            counters=policy.counters,
            tenants=[pb.TenantState(tenant=name, **asdict(tenant)) for name, tenant in policy.tenants.items()],
        )

    def _group_state(self, link: _Link, stats: GroupStats) -> pb.GroupState:
        return pb.GroupState(
            hello=link.hello,
            load=link.load,
            draining=stats.draining,
            num_outstanding=stats.num_outstanding,
            matched_tokens=stats.matched_tokens,
            held_pages=stats.held_pages,
            decisions={str(decision): count for decision, count in stats.decisions.items()},
            **self._costs(link.group),
        )

    def _costs(self, group: str) -> dict[str, float]:
        cost = self._scheduler.cost_of(group)
        return {name: getattr(cost, name) for name in COSTS} if isinstance(cost, LinearCostModel) else {}

    def tick(self) -> None:
        """Lets time pass: call it every `TICK_S`."""
        self._carry_out(self._scheduler.tick(self._clock()))

    def _join(self, message: pb.WorkerMessage) -> _Link:
        if message.WhichOneof("message") != "hello":
            raise InvalidRequestError(f"Connect: expected hello first, got {message.WhichOneof('message')}")
        hello = message.hello
        if hello.page_size != self._page_size:
            raise InvalidRequestError(
                f"group {hello.group.group}: expected kv.page_size {self._page_size}, the scheduler's, got "
                f"{hello.page_size}; give both the same configuration"
            )
        link = _Link(hello)
        instructions = self._scheduler.add_group(
            link.group, hello.num_pages, hello.generation, self._clock(), max_num_seqs=hello.max_num_seqs
        )
        self._links[link.group] = link  # in place of one that is half open and has not noticed yet
        self._carry_out(instructions)
        log.info("group %s joined from %s", link.group, hello.group.address)
        return link

    def _leave(self, link: _Link) -> None:
        if self._links.get(link.group) is link:
            del self._links[link.group]
            self._scheduler.remove_group(link.group, self._clock())
            log.info("group %s left", link.group)

    def _hear(self, link: _Link, message: pb.WorkerMessage) -> None:
        if self._links.get(link.group) is not link:
            raise GroupUnavailableError(f"group {link.group}: another link took its place, or it was silent; say hello")
        now, kind = self._clock(), message.WhichOneof("message")
        if kind == "events":
            self._carry_out(self._scheduler.kv_events(link.group, wire.events_from_proto(message.events), now))
        elif kind == "snapshot":
            self._carry_out(self._scheduler.kv_snapshot(link.group, wire.snapshot_from_proto(message.snapshot), now))
        elif kind == "load":
            link.load = message.load
            load = message.load
            self._carry_out(
                self._scheduler.load_report(
                    link.group,
                    load,
                    now,
                    next_seq=load.next_seq,
                    generation=load.generation,
                    steps=StepTotals(load.steps, load.prefill_tokens, load.decode_rows, load.step_s),
                )
            )
        elif kind == "draining":
            self._scheduler.drain_group(link.group)

    def _carry_out(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, RequestSnapshot):
                self._links[instruction.group].ask_snapshot()
            elif isinstance(instruction, GroupLost):  # its link, should it speak again, is told to say hello
                del self._links[instruction.group]
                log.warning("group %s was silent for too long", instruction.group)


def _place_error(error: Exception) -> pb.PlaceError:
    """What is no `PrebleError` is a bug: logged, and no reason to end the stream of a whole frontend."""
    if isinstance(error, PrebleError):
        return pb.PlaceError(kind=error_name(error), message=str(error))
    log.error("unexpected error in a placement", exc_info=error)
    return pb.PlaceError(kind=PrebleError.__name__, message=f"internal error: {type(error).__name__}: {error}")


class Scheduler:
    """Server and clock as a context: inside it serves."""

    def __init__(self, config: Config, port: int) -> None:
        page_size = config.kv.page_size
        self._settings, self._port = config.serve, port
        self._servicer = SchedulerServicer(GlobalScheduler(config.sched, page_size, tenants=config.tenants), page_size)
        self._server = Server([SERVICE], [partial(scheduler_pb2_grpc.add_SchedulerServicer_to_server, self._servicer)])

    @property
    def address(self) -> str:
        return self._server.address

    async def __aenter__(self) -> Scheduler:
        await self._server.start(self._settings.host, self._port, "serve.scheduler_port")
        self._ticker = asyncio.create_task(self._tick())
        await self._server.set_serving(True)
        return self

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self._servicer.tick()
            except Exception:  # a bug, but one that must not stop the clock for everybody
                log.exception("tick failed")

    async def __aexit__(self, *_: object) -> None:
        self._ticker.cancel()
        await self._server.stop()
        with suppress(asyncio.CancelledError):
            await self._ticker


def collect_rarely() -> None:
    """For a process that is a scheduler. A full pass of Python's cyclic garbage collector walks the whole forest, 20 to
    85 ms at a million pages, to find next to nothing; what calls leave behind is young.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 1_000)


async def run_scheduler(config: Config, port: int, address_file: Path | None = None) -> None:
    """Serves until SIGTERM or SIGINT. Raises `ConfigError` when the port is taken."""
    stop = stop_event()
    async with Scheduler(config, port) as scheduler:
        collect_rarely()
        announce(scheduler.address, address_file)
        await stop.wait()
