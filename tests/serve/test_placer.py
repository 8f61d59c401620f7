"""Placements of many requests on one stream: each gets its own answer, and nothing is forgotten."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import grpc
import pytest

from fakes.deployment import until
from preble_jax.errors import DeadlineError, GroupUnavailableError, InvalidRequestError
from serve import placer as placer_module
from serve.placer import MAX_BATCH, Placer
from serve.protos.preble.v1 import scheduler_pb2 as pb
from serve.protos.preble.v1 import scheduler_pb2_grpc
from serve.status import TransportError
from serve.transport import Server, open_channel


class Script(scheduler_pb2_grpc.SchedulerServicer):
    """Keeps what it hears. Refuses requests named "bad...". answering: cleared, batches wait for it. broken: streams
    break instead of answering. outstanding: of each request, the placements that were not reported finished."""

    def __init__(self) -> None:
        self.batches: list[pb.PlaceBatch] = []
        self.answering = asyncio.Event()
        self.answering.set()
        self.broken = False
        self.outstanding: Counter[str] = Counter()

    async def PlaceStream(
        self, request_iterator: AsyncIterator[pb.PlaceBatch], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.PlaceBatchResponse]:
        async for batch in request_iterator:
            self.batches.append(batch)
            self._book(batch)
            await self.answering.wait()
            if self.broken:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken")
            yield pb.PlaceBatchResponse(results=[self._result(request) for request in batch.requests])

    def _book(self, batch: pb.PlaceBatch) -> None:
        for report in batch.finished:
            self.outstanding[report.request_id] = max(0, self.outstanding[report.request_id] - 1)
        self.outstanding.update(request.request_id for request in batch.requests)

    def _result(self, request: pb.PlaceRequest) -> pb.PlaceResult:
        if request.request_id.startswith("bad"):
            return pb.PlaceResult(error=pb.PlaceError(kind="InvalidRequestError", message=request.request_id))
        return pb.PlaceResult(placement=pb.PlaceResponse(group=pb.GroupAddress(group=request.request_id)))

    @property
    def finished(self) -> list[tuple[str, bool]]:
        return [(report.request_id, report.failed) for batch in self.batches for report in batch.finished]

    @property
    def first_tokens(self) -> list[list[str]]:
        """Of each batch that has some."""
        return [[token.request_id for token in batch.first_tokens] for batch in self.batches if batch.first_tokens]


@pytest.fixture
def script() -> Iterator[Script]:
    yield Script()


@asynccontextmanager
async def placing(script: Script) -> AsyncIterator[Placer]:
    def register(server: grpc.aio.Server) -> None:
        scheduler_pb2_grpc.add_SchedulerServicer_to_server(script, server)

    server = Server(["preble.v1.Scheduler"], [register])
    address = await server.start("127.0.0.1", 0, "serve.scheduler_port")
    async with open_channel(address) as channel, Placer(scheduler_pb2_grpc.SchedulerStub(channel)) as placer:
        yield placer
    await server.stop()


def ask(placer: Placer, name: str) -> asyncio.Task[pb.PlaceResponse]:
    return asyncio.create_task(placer.place(pb.PlaceRequest(request_id=name)))


def end(name: str) -> pb.FinishedRequest:
    return pb.FinishedRequest(request_id=name)


async def test_those_who_ask_together_travel_together_and_get_their_own(script: Script) -> None:
    names = [f"{i}" if i % 3 else f"bad-{i}" for i in range(2 * MAX_BATCH)]
    async with placing(script) as placer:
        answers = await asyncio.gather(*(ask(placer, name) for name in names), return_exceptions=True)
    for name, answer in zip(names, answers, strict=True):
        if name.startswith("bad"):
            assert isinstance(answer, InvalidRequestError)
            assert str(answer) == name
        else:
            assert isinstance(answer, pb.PlaceResponse)
            assert answer.group.group == name
    assert [len(batch.requests) for batch in script.batches] == [MAX_BATCH, MAX_BATCH]


async def test_a_request_alone_does_not_wait_for_company(script: Script) -> None:
    async with placing(script) as placer:
        for name in "abc":
            assert (await ask(placer, name)).group.group == name
    assert [len(batch.requests) for batch in script.batches] == [1, 1, 1]


async def test_reports_travel_along_and_the_last_before_the_end(script: Script) -> None:
    async with placing(script) as placer:
        await ask(placer, "a")
        placer.first_token(pb.FirstToken(request_id="a", queue_s=0.5))
        placer.finished(end("a"))
    assert script.finished == [("a", False)]
    assert [(token.request_id, token.queue_s) for token in script.batches[-1].first_tokens] == [("a", 0.5)]


async def test_first_tokens_need_no_company_but_go_together(script: Script) -> None:
    async with placing(script) as placer:
        for name in "abc":
            placer.first_token(pb.FirstToken(request_id=name))
        await until(lambda: bool(script.batches))
        assert script.first_tokens == [["a", "b", "c"]]
        placer.first_token(pb.FirstToken(request_id="d"))
        await until(lambda: len(script.batches) == 2)
    assert script.first_tokens == [["a", "b", "c"], ["d"]]


async def test_a_placement_nobody_waits_for_is_given_back(script: Script) -> None:
    script.answering.clear()
    async with placing(script) as placer:
        answer = ask(placer, "a")
        await until(lambda: len(script.batches) == 1)
        answer.cancel()
        await asyncio.sleep(0)
        script.answering.set()
        await until(lambda: script.finished == [("a", True)])


@pytest.mark.parametrize("leave", ["cancelled", "late"])
async def test_a_placement_that_comes_in_the_moment_of_leaving_is_given_back(
    script: Script, monkeypatch: pytest.MonkeyPatch, leave: str
) -> None:
    monkeypatch.setattr(placer_module, "PLACE_TIMEOUT_S", 0.0 if leave == "late" else 60.0)
    async with open_channel("127.0.0.1:1") as channel:
        placer = Placer(scheduler_pb2_grpc.SchedulerStub(channel))  # it does not talk: the answer is handed in here
    answer = ask(placer, "a")
    await asyncio.sleep(0)
    batch = placer._next_batch()
    placer._hear(pb.PlaceBatchResponse(results=[script._result(request) for request in batch.requests]))
    if leave == "cancelled":
        answer.cancel()
    with pytest.raises(asyncio.CancelledError if leave == "cancelled" else DeadlineError):
        await answer
    assert [(report.request_id, report.failed) for report in placer._reports] == [("a", True)]


async def test_a_request_that_left_before_it_was_sent_is_not_sent(script: Script) -> None:
    async with placing(script) as placer:
        answer = ask(placer, "a")
        await asyncio.sleep(0)
        answer.cancel()
        await ask(placer, "b")
    assert [request.request_id for batch in script.batches for request in batch.requests] == ["b"]


async def test_a_silent_scheduler_is_a_deadline(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placer_module, "PLACE_TIMEOUT_S", 0.05)
    script.answering.clear()
    async with placing(script) as placer:
        with pytest.raises(DeadlineError):
            await ask(placer, "a")


async def test_a_stream_that_breaks_fails_who_waits_and_keeps_the_reports(script: Script) -> None:
    async with placing(script) as placer:
        await ask(placer, "a")
        script.broken = True
        placer.finished(end("a"))
        answers = await asyncio.gather(ask(placer, "b"), ask(placer, "c"), return_exceptions=True)
        assert [type(answer) for answer in answers] == [TransportError, TransportError]
        script.broken = False
        script.batches.clear()
        assert (await ask(placer, "d")).group.group == "d"
    assert script.finished[0] == ("a", False)


async def test_what_a_broken_stream_took_along_is_told_again_without_a_new_request(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placer_module, "RETRY_S", 0.0)
    async with placing(script) as placer:
        await ask(placer, "a")
        script.answering.clear()
        placer.first_token(pb.FirstToken(request_id="a"))
        lost = ask(placer, "b")
        await until(lambda: len(script.batches) == 2)
        assert script.first_tokens == [["a"]]
        assert script.outstanding["b"] == 1
        script.broken = True
        script.answering.set()
        with pytest.raises(TransportError):
            await lost
        script.broken = False
        await until(lambda: script.outstanding["b"] == 0)
        assert script.first_tokens[-1] == ["a"]
    assert script.outstanding["a"] == 1
    assert set(script.finished) == {("b", True)}


async def test_a_retry_of_the_same_name_outlives_the_report_of_the_first_try(script: Script) -> None:
    async with placing(script) as placer:
        script.broken = True
        with pytest.raises(TransportError):
            await ask(placer, "a")
        script.broken = False
        assert (await ask(placer, "a")).group.group == "a"
        await ask(placer, "b")
    assert script.outstanding == {"a": 1, "b": 1}


async def test_without_a_scheduler_the_answer_is_quick_and_there_is_nothing_to_report() -> None:
    async with open_channel("127.0.0.1:1") as channel, Placer(scheduler_pb2_grpc.SchedulerStub(channel)) as placer:
        for _ in range(3):
            with pytest.raises(GroupUnavailableError):
                await asyncio.wait_for(ask(placer, "a"), 1.0)
        assert not placer._reports
