"""A worker's process: gRPC around one device group's `EngineService`.

The engine runs in a thread of its own; this event loop only moves tokens between it and the streams.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import grpc

from preble_jax.config import Config
from preble_jax.errors import CancelledError, DeadlineError, GroupUnavailableError
from preble_jax.request import Request, RequestOutput
from serve import wire
from serve.link import EventSource, SchedulerLink
from serve.protos.preble.v1 import scheduler_pb2, worker_pb2_grpc
from serve.protos.preble.v1 import worker_pb2 as pb
from serve.status import answers_errors
from serve.transport import Server, announce, first_of, stop_event

if TYPE_CHECKING:
    from preble_jax.engine.service import GroupInfo

SERVICE = pb.DESCRIPTOR.services_by_name["Worker"].full_name
STOP_GRACE_S = 1.0

log = logging.getLogger(__name__)


class Engine(EventSource, Protocol):
    """What a worker needs of `preble_jax.engine.service.EngineService`."""

    info: GroupInfo

    def start(self, loop: asyncio.AbstractEventLoop) -> None: ...

    def close(self) -> None: ...

    def submit(self, request: Request) -> AsyncGenerator[RequestOutput, None]: ...

    def drain(self) -> None: ...

    async def drained(self) -> None: ...


class WorkerServicer(worker_pb2_grpc.WorkerServicer):
    """failed: set once the engine has stopped though nobody asked it to; nothing can be served here any more."""

    def __init__(self, engine: Engine, link: SchedulerLink) -> None:
        self._engine = engine
        self._link = link
        self._draining = False
        self.failed = asyncio.Event()

    @answers_errors
    async def Generate(
        self, request: pb.WorkerGenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WorkerGenerateResponse]:
        remaining_s = context.time_remaining()
        deadline_s = None if remaining_s is None else time.monotonic() + remaining_s
        try:
            # Closing the engine's iterator early is what cancels the request.
            async with aclosing(self._engine.submit(wire.request_from_proto(request, deadline_s))) as outputs:
                async for output in outputs:
                    yield _response(output)
        except GroupUnavailableError:
            if not self._draining:
                self.failed.set()
            raise

    @answers_errors
    async def Drain(self, request: pb.DrainRequest, context: grpc.aio.ServicerContext) -> pb.DrainResponse:
        self._draining = True
        self._engine.drain()
        self._link.drain()
        await self._engine.drained()
        return pb.DrainResponse()


def _response(output: RequestOutput) -> pb.WorkerGenerateResponse:
    """Raises what ends the call with a status: `DeadlineError`, `CancelledError`, or `GroupUnavailableError` when the
    engine has stopped."""
    if output.finish_reason == "deadline":
        raise DeadlineError("the request's deadline passed before it finished")
    if output.finish_reason == "cancelled":
        raise CancelledError("the request was cancelled at the device group")
    if output.finish_reason == "error":
        raise GroupUnavailableError(output.error)
    return pb.WorkerGenerateResponse(
        token_ids=output.token_ids,
        logprobs=output.logprobs,
        finish_reason=wire.finish_reason_to_proto(output.finish_reason),
        cached_tokens=output.cached_tokens,
        queue_s=output.queue_s,
    )


def make_hello(group: str, address: str, info: GroupInfo, queue: str) -> scheduler_pb2.Hello:
    """queue: name of the local queue's policy."""
    return scheduler_pb2.Hello(
        group=scheduler_pb2.GroupAddress(group=group, address=address),
        model=info.model,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        page_size=info.page_size,
        num_pages=info.num_pages,
        max_num_seqs=info.max_num_seqs,
        generation=info.generation,
        queue=queue,
    )


async def run_worker(
    engine: Engine, config: Config, group: str, scheduler_address: str, port: int, address_file: Path | None = None
) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises `ConfigError` when the port is taken, `GroupUnavailableError` when the engine stops on its own.
    """
    stop = stop_event()
    engine.start(asyncio.get_running_loop())
    try:
        async with Worker(engine, config, group, scheduler_address, port) as worker:
            announce(worker.address, address_file)
            await first_of(stop, worker.failed)
            if worker.failed.is_set():
                raise GroupUnavailableError(f"device group {group}: its engine stopped; the error is in the log above")
    finally:
        engine.close()


class Worker:
    """Server and link of one engine that was started, as a context: inside it serves. failed: as `WorkerServicer`'s."""

    def __init__(self, engine: Engine, config: Config, group: str, scheduler_address: str, port: int) -> None:
        hello = make_hello(group, "", engine.info, config.queue.policy)
        self._hello, self._settings, self._port = hello, config.serve, port
        self._link = SchedulerLink(engine, scheduler_address, hello, config.serve.report_interval_s)
        servicer = WorkerServicer(engine, self._link)
        self.failed = servicer.failed
        self._server = Server([SERVICE], [partial(worker_pb2_grpc.add_WorkerServicer_to_server, servicer)])

    @property
    def address(self) -> str:
        return self._server.address

    async def __aenter__(self) -> Worker:
        await self._server.start(self._settings.host, self._port, "serve.worker_port")
        self._hello.group.address = self.address
        self._link_task = asyncio.create_task(self._link.run())
        await self._server.set_serving(True)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._link_task.cancel()
        with suppress(asyncio.CancelledError):
            await self._link_task
        await self._server.stop(STOP_GRACE_S)
