"""Where a frontend sends a request: the scheduler's answer, and without a scheduler consistent hashing.

Rendezvous hashing of the first block hashes: requests that begin alike meet on one group, and when a group goes only
its own requests move. The groups are those the scheduler told of last; they stay known while it is away.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b

from preble_jax.errors import DeadlineError, GroupUnavailableError, PrebleError
from serve import wire
from serve.placer import PLACE_TIMEOUT_S, Placer
from serve.protos.preble.v1 import scheduler_pb2 as pb
from serve.protos.preble.v1 import scheduler_pb2_grpc
from serve.status import TransportError, transport_errors
from serve.transport import open_channel

POLL_S = 1.0
FORGET_S = 3.0  # a scheduler that answers and names no group is believed after so long
# Requests whose first FALLBACK_BLOCKS pages are equal go to the same group. Deeper, and conversations with a common
# system prompt spread; shallower, and everything that shares a chat template's first words lands on one group.
FALLBACK_BLOCKS = 4

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Route:
    """One attempt at serving a request. generation: of the group's process. placed: the scheduler knows of it and wants
    to hear how it ended."""

    attempt_id: str
    group: str
    address: str
    generation: int
    placed: bool

    @property
    def process(self) -> pb.GroupProcess:
        return pb.GroupProcess(group=self.group, generation=self.generation)


class Router:
    """Asks the scheduler, remembers its groups, reports back. Use as a context; inside, groups are polled.

    num_fallbacks: requests placed without the scheduler.
    on_availability: told when the first group comes, and when the last one is gone.
    """

    def __init__(self, scheduler_address: str, poll_s: float = POLL_S, forget_s: float = FORGET_S) -> None:
        self._address = scheduler_address
        self._poll_s = poll_s
        self._forget_s = forget_s
        self._reachable = True
        self.num_fallbacks = 0
        self.groups: dict[str, pb.Hello] = {}
        self.on_availability: Callable[[bool], Awaitable[None]] | None = None
        self._named_none_at: float | None = None  # since when the scheduler answers and names no group

    async def __aenter__(self) -> Router:
        self._channel = open_channel(self._address)
        self._stub = scheduler_pb2_grpc.SchedulerStub(self._channel)
        self._placer = await Placer(self._stub).__aenter__()
        self._poller = asyncio.create_task(self._poll())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._poller.cancel()
        with suppress(asyncio.CancelledError):
            await self._poller
        await self._placer.__aexit__()
        await self._channel.close()

    @property
    def max_model_len(self) -> int | None:
        """Of the groups that are known; None: no group is."""
        return min((hello.max_model_len for hello in self.groups.values()), default=None)

    async def place(self, request: pb.PlaceRequest) -> Route:
        """Raises `GroupUnavailableError` when no group is left.

        request.request_id: names the attempt, a new one each time.
        """
        try:
            answer = await self._placer.place(request)
        except PrebleError as error:
            answered = not isinstance(error, TransportError | DeadlineError)
            if answered and not isinstance(error, GroupUnavailableError):
                raise
            # A scheduler that answers but knows no group for us may have just started: ours may well be up.
            self._note_reachable(answered, error)
            return self._fall_back(request, error)
        self._note_reachable(True)
        group = answer.group
        return Route(request.request_id, group.group, group.address, answer.generation, placed=True)

    def first_token(self, route: Route, queue_s: float | None) -> None:
        """The prompt is computed. queue_s: what the request waited in its group's queue, if the group said so."""
        if route.placed:
            self._placer.first_token(pb.FirstToken(request_id=route.attempt_id, queue_s=queue_s))

    def finished(self, route: Route, output_tokens: int, cached_tokens: int, failed: bool) -> None:
        """Tells the scheduler, soon. Must be called once for every `place`."""
        if route.placed:
            self._placer.finished(
                pb.FinishedRequest(
                    request_id=route.attempt_id, output_tokens=output_tokens, cached_tokens=cached_tokens, failed=failed
                )
            )

    def _fall_back(self, request: pb.PlaceRequest, error: PrebleError) -> Route:
        failed = {(process.group, process.generation) for process in request.excluded}
        groups = {name for name, hello in self.groups.items() if (name, hello.generation) not in failed}
        if not groups:
            raise GroupUnavailableError(
                f"expected a device group to serve the request, none is left ({error})"
            ) from error
        self.num_fallbacks += 1
        key = rendezvous_key(wire.hashes_from_bytes(request.block_hashes), request.request_id)
        group = rendezvous(key, groups)
        hello = self.groups[group]
        return Route(request.request_id, group, hello.group.address, hello.generation, placed=False)

    async def _poll(self) -> None:
        while True:
            await self._poll_once()
            await asyncio.sleep(self._poll_s if self.groups else self._poll_s / 10)

    async def _poll_once(self) -> None:
        try:
            with transport_errors():
                state = await self._stub.GetState(pb.GetStateRequest(), timeout=PLACE_TIMEOUT_S)
            self._note_reachable(True)
            await self._learn(state)
        except PrebleError as error:
            self._note_reachable(False, error)
            self._named_none_at = None

    async def _learn(self, state: pb.GetStateResponse) -> None:
        """A scheduler that has just restarted knows no group for a moment, however long it was away: the ones known
        before are kept that long."""
        groups = {state.hello.group.group: state.hello for state in state.groups if not state.draining}
        now = time.monotonic()
        if groups:
            self._named_none_at = None
        else:
            if self._named_none_at is None:
                self._named_none_at = now
            if now - self._named_none_at < self._forget_s:
                return
        if bool(groups) != bool(self.groups) and self.on_availability is not None:
            await self.on_availability(bool(groups))
        self.groups = groups

    def _note_reachable(self, reachable: bool, error: PrebleError | None = None) -> None:
        if reachable != self._reachable:
            self._reachable = reachable
            if reachable:
                log.info("the scheduler at %s is back", self._address)
            else:
                log.warning("no scheduler at %s (%s): placing by consistent hashing", self._address, error)


def rendezvous_key(block_hashes: Sequence[bytes], request_id: str) -> bytes:
    """One chained hash covers all blocks before it. A prompt below a page has none and shares nothing: spread those."""
    return block_hashes[min(FALLBACK_BLOCKS, len(block_hashes)) - 1] if block_hashes else request_id.encode()


def rendezvous(key: bytes, groups: Collection[str]) -> str:
    """Highest random weight (Thaler and Ravishankar, 1998): the group whose hash together with `key` is largest."""
    return max(groups, key=lambda group: blake2b(key + group.encode(), digest_size=8).digest())
