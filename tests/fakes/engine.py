"""A device group without a device: answers with the prompt's own tokens, and keeps pages as a set of block hashes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from preble_jax.errors import GroupUnavailableError, InvalidRequestError
from preble_jax.kv.events import BlocksStored, EventBatch, KVEvent, Snapshot
from preble_jax.kv.hashing import block_hashes
from preble_jax.request import Request, RequestOutput


@dataclass(frozen=True, kw_only=True)
class FakeInfo:
    model: str = "fake"
    vocab_size: int = 258
    max_model_len: int = 512
    page_size: int = 4
    num_pages: int = 1000
    max_num_seqs: int = 8
    generation: int = 1


@dataclass(frozen=True, kw_only=True)
class FakeLoad:
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
    next_seq: int = 0
    generation: int = 0
    tenants: tuple[object, ...] = ()


class FakeEngine:
    """The interface of `EngineService`.

    hold_after: tokens after which every request waits for `resume()`; None: nobody waits.
    fail: raised by `submit` before the first token. stopped: as after a failure of the engine's thread.
    running, cancelled, deadlines: request ids, for tests to look at.
    """

    def __init__(self, info: FakeInfo | None = None) -> None:
        self.info = info or FakeInfo()
        self.hold_after: int | None = None
        self.fail: Exception | None = None
        self.stopped = False
        self.running: dict[str, Request] = {}
        self.cancelled: list[str] = []
        self.num_requests = 0
        self._resumed = asyncio.Event()
        self._draining = False
        self._stored: dict[bytes, BlocksStored] = {}
        self._events: list[KVEvent] = []
        self._next_seq = 0
        self._prompt_tokens = self._cached_tokens = self._output_tokens = 0

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        pass

    def close(self) -> None:
        pass

    def resume(self) -> None:
        self._resumed.set()

    async def submit(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        self._check(request)
        cached_tokens = self._admit(request)
        try:
            for index in range(request.sampling.max_tokens):
                if index == self.hold_after:
                    await self._resumed.wait()
                await asyncio.sleep(0)
                if self.stopped:
                    yield RequestOutput(request_id=request.request_id, finish_reason="error", error="out of memory")
                    return
                yield self._output(request, index, cached_tokens)
                if self._reason(request, index) is not None:
                    return
        except (GeneratorExit, asyncio.CancelledError):
            self.cancelled.append(request.request_id)
            raise
        finally:
            del self.running[request.request_id]

    def _check(self, request: Request) -> None:
        if self._draining or self.stopped:
            raise GroupUnavailableError("this group drains or has stopped")
        if self.fail is not None:
            raise self.fail
        if any(token >= self.info.vocab_size for token in request.prompt_token_ids):
            raise InvalidRequestError("token id out of range")

    def _admit(self, request: Request) -> int:
        """Takes the request's pages; returns how many prompt tokens were there already."""
        self.running[request.request_id] = request
        self.num_requests += 1
        hashes = block_hashes(request.prompt_token_ids, self.info.page_size, request.cache_salt)
        known = sum(block in self._stored for block in hashes)
        if new := hashes[known:]:
            chain = BlocksStored(tuple(new), hashes[known - 1] if known else None)
            self._events.append(chain)
            self._stored.update(dict.fromkeys(new, chain))
        # The last token is always computed: a page that contains it saves nothing.
        cached = min(known, (len(request.prompt_token_ids) - 1) // self.info.page_size) * self.info.page_size
        self._prompt_tokens += len(request.prompt_token_ids)
        self._cached_tokens += cached
        return cached

    def _output(self, request: Request, index: int, cached_tokens: int) -> RequestOutput:
        self._output_tokens += 1
        return RequestOutput(
            request_id=request.request_id,
            token_ids=[self._token(request, index)],
            logprobs=[-0.5] if request.sampling.logprobs else [],
            finish_reason=self._reason(request, index),
            cached_tokens=cached_tokens,
            queue_s=0.25,
        )

    @staticmethod
    def _token(request: Request, index: int) -> int:
        return request.prompt_token_ids[index % len(request.prompt_token_ids)]

    def _reason(self, request: Request, index: int) -> str | None:
        if self._token(request, index) in request.stop_token_ids:
            return "stop"
        return "length" if index + 1 == request.sampling.max_tokens else None

    def drain(self) -> None:
        self._draining = True

    async def drained(self) -> None:
        while self.running:
            await asyncio.sleep(0.01)

    def take_events(self) -> EventBatch | None:
        if not self._events:
            return None
        batch = EventBatch(self.info.generation, self._next_seq, tuple(self._events))
        self._next_seq += len(self._events)
        self._events = []
        return batch

    async def snapshot(self) -> Snapshot:
        chains = tuple(dict.fromkeys(self._stored.values()))
        return Snapshot(self.info.generation, self._next_seq + len(self._events), chains)

    def load(self) -> FakeLoad:
        return FakeLoad(
            num_running=len(self.running),
            free_pages=self.info.num_pages - len(self._stored),
            cached_pages=len(self._stored),
            num_pages=self.info.num_pages,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
            next_seq=self._next_seq + len(self._events),
            generation=self.info.generation,
        )
