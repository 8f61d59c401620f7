"""A worker's link to the scheduler: one stream that carries KV events and load up, and requests for snapshots down.

The link is soft state. When it breaks, or the scheduler starts anew, the worker connects again and says hello, and
the scheduler asks for a snapshot; events of the time in between are in that snapshot and are thrown away here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from preble_jax.errors import PrebleError
from preble_jax.kv.events import EventBatch, Snapshot
from serve import wire
from serve.protos.preble.v1 import scheduler_pb2 as pb
from serve.protos.preble.v1 import scheduler_pb2_grpc
from serve.status import transport_errors
from serve.transport import open_channel

if TYPE_CHECKING:
    from preble_jax.engine.service import GroupLoad

RETRY_S = 0.5

log = logging.getLogger(__name__)


class EventSource(Protocol):
    """The part of `EngineService` that the scheduler hears about."""

    def take_events(self) -> EventBatch | None: ...

    async def snapshot(self) -> Snapshot: ...

    def load(self) -> GroupLoad: ...


class SchedulerLink:
    """hello: what this group is. interval_s: between reports."""

    def __init__(self, source: EventSource, scheduler_address: str, hello: pb.Hello, interval_s: float) -> None:
        self._source = source
        self._address = scheduler_address
        self._hello = hello
        self._interval_s = interval_s
        self._wake = asyncio.Event()
        self._snapshot_wanted = False
        self._draining = False

    def drain(self) -> None:
        """Tells the scheduler, now and after every reconnect, to place nothing here."""
        self._draining = True
        self._wake.set()

    async def run(self) -> None:
        """Keeps the link up until cancelled."""
        async with open_channel(self._address) as channel:
            stub = scheduler_pb2_grpc.SchedulerStub(channel)
            was_lost = False
            while True:
                try:
                    await self._session(stub)
                except PrebleError as error:
                    if not was_lost:
                        log.warning("no link to the scheduler at %s (%s); trying again", self._address, error)
                was_lost = True
                self._source.take_events()
                await asyncio.sleep(RETRY_S)

    async def _session(self, stub: scheduler_pb2_grpc.SchedulerStub) -> None:
        with transport_errors():
            async for _ in stub.Connect(self._messages()):  # there is one kind of message: a request for a snapshot
                self._snapshot_wanted = True
                self._wake.set()

    async def _messages(self) -> AsyncIterator[pb.WorkerMessage]:
        self._snapshot_wanted = told_draining = False
        yield pb.WorkerMessage(hello=self._hello)
        while True:
            self._wake.clear()
            if self._snapshot_wanted:
                self._snapshot_wanted = False
                yield pb.WorkerMessage(snapshot=wire.snapshot_to_proto(await self._source.snapshot()))
            load = self._source.load()  # before the events, so that these cover all that it counts
            if (events := self._source.take_events()) is not None:
                yield pb.WorkerMessage(events=wire.events_to_proto(events))
            if self._draining and not told_draining:
                told_draining = True
                yield pb.WorkerMessage(draining=pb.Draining())
            yield pb.WorkerMessage(load=wire.load_to_proto(load))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._interval_s)
