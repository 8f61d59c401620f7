"""A frontend's conversation with the scheduler: one stream, on which placements and reports of all its requests travel.

What comes while a batch is being written goes out with the next one, so that batches grow with the load and no
placement waits for a timer. The stream is opened when there is something to say, and again after it broke.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import suppress

import grpc

from preble_jax.errors import DeadlineError, PrebleError
from serve.protos.preble.v1 import scheduler_pb2 as pb
from serve.protos.preble.v1 import scheduler_pb2_grpc
from serve.status import TransportError, error_by_name, transport_errors

PLACE_TIMEOUT_S = 2.0
# The scheduler does nothing else while it decides on a batch: a few milliseconds at most.
MAX_BATCH = 64
# First tokens of so long go together where no placement and no end takes them along before. Until they come the
# scheduler takes the prompts for queued.
FIRST_TOKENS_S = 0.02
# Until a stream that broke is opened again for reports alone.
RETRY_S = 1.0
# Reports kept for a scheduler that is away. A new one knows none of these requests; one that was cut off wants them.
MAX_UNREPORTED = 10_000

log = logging.getLogger(__name__)

Answer = asyncio.Future[pb.PlaceResponse]


class Placer:
    """Use as a context. A batch on its way is remembered until its answer comes: answers come in order."""

    def __init__(self, stub: scheduler_pb2_grpc.SchedulerStub) -> None:
        self._stub = stub
        self._requests: deque[tuple[pb.PlaceRequest, Answer]] = deque()
        self._first_tokens: deque[pb.FirstToken] = deque(maxlen=MAX_UNREPORTED)
        self._reports: deque[pb.FinishedRequest] = deque(maxlen=MAX_UNREPORTED)
        self._on_their_way: deque[tuple[pb.PlaceBatch, list[Answer]]] = deque()
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._reached = False  # something was written to the present stream, so the scheduler may have read it
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Placer:
        self._talking = asyncio.create_task(self._talk())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Sends the last reports first, if the scheduler is there."""
        if self._to_say or self._on_their_way:
            self._settled.clear()
            self._wake.set()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._settled.wait(), PLACE_TIMEOUT_S)
        self._talking.cancel()
        with suppress(asyncio.CancelledError):
            await self._talking
        if self._timer is not None:
            self._timer.cancel()

    async def place(self, request: pb.PlaceRequest) -> pb.PlaceResponse:
        """Raises what the scheduler raised, `TransportError` when the stream broke, `DeadlineError` when it is silent.

        A placement that arrives when nobody waits for it any more is reported finished.
        """
        answer: Answer = asyncio.get_running_loop().create_future()
        self._requests.append((request, answer))
        self._wake.set()
        try:
            async with asyncio.timeout(PLACE_TIMEOUT_S):
                return await answer
        except (TimeoutError, asyncio.CancelledError) as error:
            if answer.done() and not answer.cancelled() and answer.exception() is None:  # it came in the same moment
                self.finished(_unused(request))
            if isinstance(error, TimeoutError):
                raise DeadlineError(f"expected a placement within {PLACE_TIMEOUT_S:g} s, got none") from None
            raise

    def first_token(self, report: pb.FirstToken) -> None:
        """Goes with the next batch, or after FIRST_TOKENS_S: it is worth no message of its own."""
        self._first_tokens.append(report)
        self._wake_in(FIRST_TOKENS_S)

    def finished(self, report: pb.FinishedRequest) -> None:
        """Goes with the next batch."""
        self._reports.append(report)
        self._wake.set()

    async def _talk(self) -> None:
        while True:
            await self._wake.wait()
            call = self._stub.PlaceStream()
            self._reached = False
            sending = asyncio.create_task(self._send(call))
            try:
                with transport_errors():
                    async for response in call:
                        self._hear(response)
                self._give_up("it was closed")
            except PrebleError as error:  # whatever its status: it says nothing about any one request
                self._give_up(str(error))
            finally:
                sending.cancel()
                call.cancel()

    async def _send(self, call: grpc.aio.StreamStreamCall) -> None:
        with suppress(grpc.RpcError, asyncio.InvalidStateError):  # the stream broke, which `_talk` hears
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._to_say:
                    await call.write(self._next_batch())
                    self._reached = True

    def _next_batch(self) -> pb.PlaceBatch:
        batch, answers = pb.PlaceBatch(first_tokens=self._first_tokens, finished=self._reports), list[Answer]()
        self._first_tokens.clear()
        self._reports.clear()
        while self._requests and len(answers) < MAX_BATCH:
            request, answer = self._requests.popleft()
            if not answer.done():
                batch.requests.append(request)
                answers.append(answer)
        self._on_their_way.append((batch, answers))
        return batch

    def _hear(self, response: pb.PlaceBatchResponse) -> None:
        batch, answers = self._on_their_way.popleft()
        for request, answer, result in zip(batch.requests, answers, response.results, strict=True):
            if result.WhichOneof("result") == "error":
                if not answer.done():
                    answer.set_exception(error_by_name(result.error.kind, result.error.message))
            elif answer.done():
                self.finished(_unused(request))
            else:
                answer.set_result(result.placement)
        for error in response.report_errors:
            log.info("a report was refused: %s", error.message)
        self._settle()

    def _give_up(self, reason: str) -> None:
        """The stream is gone: whoever waits is told, and what has no answer is told to the next stream.

        Requests that went with it may have been placed: they are reported ended. That comes before any other request of
        the same id, since reports are taken first.
        """
        first_tokens: list[pb.FirstToken] = []
        reports: list[pb.FinishedRequest] = []
        waiting: list[Answer] = []
        for batch, answers in self._on_their_way:
            first_tokens += batch.first_tokens
            reports += batch.finished
            if self._reached:
                reports += map(_unused, batch.requests)
            waiting += answers
        waiting += (answer for _, answer in self._requests)
        self._first_tokens = deque([*first_tokens, *self._first_tokens], MAX_UNREPORTED)
        self._reports = deque([*reports, *self._reports], MAX_UNREPORTED)
        self._requests.clear()
        self._on_their_way.clear()
        self._wake.clear()
        if self._to_say:
            self._wake_in(RETRY_S)
        for answer in waiting:
            if not answer.done():
                answer.set_exception(TransportError(f"the stream to the scheduler broke: {reason}"))
        self._settled.set()

    @property
    def _to_say(self) -> bool:
        return bool(self._requests or self._reports or self._first_tokens)

    def _wake_in(self, delay_s: float) -> None:
        """Unless a time is set already."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._to_say:
            self._wake.set()

    def _settle(self) -> None:
        if not (self._to_say or self._on_their_way):
            self._settled.set()


def _unused(request: pb.PlaceRequest) -> pb.FinishedRequest:
    """The report of a placement that nobody will use."""
    return pb.FinishedRequest(request_id=request.request_id, failed=True)
