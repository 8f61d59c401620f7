"""The engine for an event loop: it runs in a thread of its own, requests and tokens cross over.

Into the thread go commands, one queue; out of it come outputs, one callback a step. The engine itself is touched by its
thread alone; what others may read (`load`, `take_events`) is published by that thread after each step.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from preble_jax.config import Config
from preble_jax.engine.engine import Engine
from preble_jax.engine.ledger import TenantLoad
from preble_jax.errors import GroupUnavailableError, InvalidRequestError
from preble_jax.kv.events import EventBatch, Snapshot
from preble_jax.progress import Progress
from preble_jax.request import Request, RequestOutput

TENANTS_INTERVAL_S = 0.2

logger = logging.getLogger(__name__)

T = TypeVar("T")
Command = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class GroupInfo:
    """What a device group says about itself once. generation grows with every start."""

    model: str
    vocab_size: int
    max_model_len: int
    page_size: int
    num_pages: int
    max_num_seqs: int
    generation: int


@dataclass(frozen=True, kw_only=True)
class GroupLoad:
    """A device group's state between two steps, and totals since its start; step_s_recent is an exponential mean.

    steps, prefill_tokens, decode_rows, step_s: what all steps computed and how many seconds they took, the terms of a
    regression of step time. admitted, queue_s: requests that left the queue, and seconds they had waited in it.
    next_seq: number the next KV event of this generation will have. tenants: the most recently active ones, as of
    TENANTS_INTERVAL_S ago at most while there is work.
    """

    num_waiting: int = 0
    num_running: int = 0
    waiting_tokens: int = 0
    free_pages: int = 0
    cached_pages: int = 0
    num_pages: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    finished: int = 0
    steps: int = 0
    step_s_recent: float = 0.0
    prefill_tokens: int = 0
    decode_rows: int = 0
    step_s: float = 0.0
    admitted: int = 0
    queue_s: float = 0.0
    next_seq: int = 0
    generation: int = 0
    tenants: tuple[TenantLoad, ...] = ()


class EngineService:
    """`start`, then `submit` from the loop's thread; `close` ends everything that is still running."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.info = GroupInfo(
            model=engine.config.model.name,
            vocab_size=engine.limits.vocab_size,
            max_model_len=engine.limits.max_model_len,
            page_size=engine.config.kv.page_size,
            num_pages=engine.cache.pool.num_pages,
            max_num_seqs=engine.limits.max_num_seqs,
            generation=engine.cache.events.generation,
        )
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._streams: dict[str, asyncio.Queue[RequestOutput]] = {}  # the loop's thread only
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tenants: tuple[TenantLoad, ...] = ()
        self._tenants_at = -math.inf
        self._load = self._measure()
        self._events_lock = threading.Lock()
        self._batches: list[EventBatch] = []
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @classmethod
    def create(cls, config: Config, progress: Progress | None = None) -> EngineService:
        """Loads the model and compiles; takes its time. Raises PrebleError."""
        return cls(Engine.create(config, progress))

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def close(self) -> None:
        """Stops after the current step. Streams that are open end with an error output."""
        if self._thread.is_alive():
            self._commands.put(None)
            self._thread.join()

    async def submit(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of a request until a finished one. Leaving early cancels it: its pages are free one step later.

        Raises InvalidRequestError, PromptTooLongError, OverloadedError or GroupUnavailableError, before any output.
        """
        if self._draining or not self._thread.is_alive():
            raise GroupUnavailableError("this device group drains or has stopped; send the request to another one")
        if request.request_id in self._streams:
            raise InvalidRequestError(f"request_id: expected a new one, got {request.request_id!r}, which is running")
        outputs: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._streams[request.request_id] = outputs
        self._idle.clear()
        finished = False
        try:
            await self._call(lambda: self._engine.add(request))
            while not finished:
                output = await outputs.get()
                finished = output.finished
                yield output
        except BaseException:
            if not finished:
                self._commands.put(lambda: self._cancel(request.request_id))
            raise
        finally:
            del self._streams[request.request_id]
            if not self._streams:
                self._idle.set()

    def drain(self) -> None:
        """Refuses new requests from now on; those that run go on."""
        self._draining = True

    async def drained(self) -> None:
        """Returns when no request is left."""
        await self._idle.wait()

    def load(self) -> GroupLoad:
        """As of the last step."""
        return self._load

    def take_events(self) -> EventBatch | None:
        """KV events since the last call, as of the last step."""
        with self._events_lock:
            batches, self._batches = self._batches, []
        if not batches:
            return None
        events = tuple(event for batch in batches for event in batch.events)
        return EventBatch(batches[0].generation, batches[0].first_seq, events)

    async def snapshot(self) -> Snapshot:
        """The whole prefix tree, between two steps. Events that are part of it are not handed out any more."""
        return await self._call(self._take_snapshot)

    async def reset_prefix_cache(self) -> bool:
        """Forgets every cached page that no running request uses; True if nothing is left."""
        return await self._call(self._engine.reset_prefix_cache)

    # -- the engine's thread -----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._obey():
                if self._engine.has_work:
                    self._publish(self._engine.step())
        except BaseException as error:
            logger.exception("the engine stopped")
            self._fail_all(f"the engine stopped: {error!r}")
            raise
        self._fail_all("the device group was stopped")

    def _obey(self) -> bool:
        """Carries out what waits in the command queue; sleeps there while there is nothing to run. False: stop."""
        block = not self._engine.has_work
        while True:
            try:
                command = self._commands.get(block=block)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            block = False

    def _take_snapshot(self) -> Snapshot:
        with self._events_lock:
            self._batches = []
            return self._engine.cache.events.snapshot(self._engine.cache.tree)

    def _publish(self, outputs: list[RequestOutput] | None = None) -> None:
        """Makes what the last step or command changed visible to the loop's thread."""
        with self._events_lock:
            batch = self._engine.cache.events.take()
            if batch is not None:
                self._batches.append(batch)
        self._load = self._measure()  # after the events: what it counts of them can be taken
        if outputs:
            self._post(lambda: self._deliver(outputs))

    def _cancel(self, request_id: str) -> None:
        self._engine.cancel(request_id)
        self._publish()

    def _measure(self) -> GroupLoad:
        engine, scheduler, ledger = self._engine, self._engine.scheduler, self._engine.ledger
        return GroupLoad(
            num_waiting=scheduler.num_waiting,
            num_running=len(scheduler.running),
            waiting_tokens=scheduler.waiting_tokens,
            free_pages=engine.cache.pool.num_free,
            cached_pages=engine.cache.num_cached,
            num_pages=engine.cache.pool.num_pages,
            prompt_tokens=scheduler.num_prompt_tokens,
            cached_tokens=scheduler.num_cached_tokens,
            output_tokens=ledger.total.output_tokens,
            finished=ledger.finished,
            steps=ledger.steps,
            step_s_recent=ledger.step_s_recent,
            prefill_tokens=ledger.total.extend_tokens,
            decode_rows=ledger.decode_rows,
            step_s=ledger.step_s,
            admitted=ledger.total.admitted,
            queue_s=ledger.total.queue_s,
            next_seq=engine.cache.events.next_seq,
            generation=engine.cache.events.generation,
            tenants=self._measure_tenants(),
        )

    def _measure_tenants(self) -> tuple[TenantLoad, ...]:
        """A few times a second is enough, and there may be a thousand of them."""
        now = self._engine.clock()
        if now - self._tenants_at >= TENANTS_INTERVAL_S or not self._engine.has_work:
            self._tenants_at = now
            self._tenants = self._engine.ledger.tenants(self._engine.scheduler.tenant_deficits())
        return self._tenants

    def _fail_all(self, error: str) -> None:
        def fail() -> None:
            for request_id, outputs in self._streams.items():
                outputs.put_nowait(RequestOutput(request_id=request_id, finish_reason="error", error=error))

        self._post(fail)

    # -- between the threads -----------------------------------------------------------------------

    def _post(self, callback: Command) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put_nowait(output)

    async def _call(self, function: Callable[[], T]) -> T:
        """Runs `function` in the engine's thread between two steps."""
        result: Future[T] = Future()

        def command() -> None:
            if not result.set_running_or_notify_cancel():
                return  # the caller is gone
            try:
                value = function()
            except Exception as error:
                result.set_exception(error)
            else:
                self._publish()  # first, so that the caller finds its effect
                result.set_result(value)

        self._commands.put(command)
        return await asyncio.wrap_future(result)
