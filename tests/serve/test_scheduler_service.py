"""The scheduler's service as workers and frontends see it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from fakes.deployment import CONFIG, until
from fakes.engine import FakeInfo
from preble_jax.config import Config, SchedSettings
from preble_jax.errors import GroupUnavailableError, InvalidRequestError, NotFoundError
from preble_jax.sched import GlobalScheduler
from serve.protos.preble.v1 import scheduler_pb2 as pb
from serve.protos.preble.v1 import scheduler_pb2_grpc
from serve.scheduler import Scheduler
from serve.status import transport_errors
from serve.transport import open_channel
from serve.worker import make_hello

HASHES = [bytes([i]) * 16 for i in range(3)]


@pytest.fixture
async def stub() -> AsyncIterator[scheduler_pb2_grpc.SchedulerStub]:
    config = Config(kv=CONFIG.kv, sched=SchedSettings(group_timeout_s=0.3))
    async with Scheduler(config, 0) as scheduler, open_channel(scheduler.address) as channel:
        yield scheduler_pb2_grpc.SchedulerStub(channel)


def hello(group: str = "a", page_size: int = 4, generation: int = 1) -> pb.WorkerMessage:
    address = pb.GroupAddress(group=group, address=f"{group}:1")
    return pb.WorkerMessage(hello=pb.Hello(group=address, page_size=page_size, num_pages=100, generation=generation))


def stored(first_seq: int) -> pb.WorkerMessage:
    chain = pb.BlocksStored(hashes=[HASHES[first_seq]], parent=HASHES[first_seq - 1] if first_seq else b"")
    batch = pb.KVEventBatch(generation=1, first_seq=first_seq, events=[pb.KVEvent(stored=chain)])
    return pb.WorkerMessage(events=batch)


async def next_message(call: AsyncIterator[pb.SchedulerMessage]) -> str | None:
    with transport_errors():
        message = await asyncio.wait_for(call.read(), 2.0)  # type: ignore[attr-defined]
        return message.WhichOneof("message") if message else None


async def test_a_hello_is_answered_with_a_wish_for_a_snapshot(stub: scheduler_pb2_grpc.SchedulerStub) -> None:
    call = stub.Connect()
    await call.write(hello())
    assert await next_message(call) == "snapshot_request"
    call.cancel()


async def test_a_worker_says_how_many_sequences_it_runs_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(GlobalScheduler, "add_group", lambda *_, max_num_seqs, **__: told.append(max_num_seqs) or [])
    async with Scheduler(CONFIG, 0) as scheduler, open_channel(scheduler.address) as channel:
        call = scheduler_pb2_grpc.SchedulerStub(channel).Connect()
        message = make_hello("a", "a:1", FakeInfo(max_num_seqs=5), "fair")
        await call.write(pb.WorkerMessage(hello=message))
        await until(lambda: bool(told))
        call.cancel()
    assert told == [5]


async def test_a_gap_in_the_events_is_answered_with_another(stub: scheduler_pb2_grpc.SchedulerStub) -> None:
    call = stub.Connect()
    await call.write(hello())
    assert await next_message(call) == "snapshot_request"
    chain = pb.BlocksStored(hashes=HASHES[:1])
    await call.write(pb.WorkerMessage(snapshot=pb.KVSnapshot(generation=1, next_seq=1, stored=[chain])))
    await call.write(stored(first_seq=2))
    assert await next_message(call) == "snapshot_request"
    call.cancel()


async def test_what_does_not_begin_with_hello_is_refused(stub: scheduler_pb2_grpc.SchedulerStub) -> None:
    call = stub.Connect()
    await call.write(stored(first_seq=0))
    with pytest.raises(InvalidRequestError, match="hello first, got events"):
        await next_message(call)


async def test_another_page_size_is_refused(stub: scheduler_pb2_grpc.SchedulerStub) -> None:
    call = stub.Connect()
    await call.write(hello(page_size=16))
    with pytest.raises(InvalidRequestError, match="page_size 4"):
        await next_message(call)


async def test_a_second_hello_takes_the_group_over(stub: scheduler_pb2_grpc.SchedulerStub) -> None:
    first, second = stub.Connect(), stub.Connect()
    await first.write(hello())
    assert await next_message(first) == "snapshot_request"
    await second.write(hello(generation=2))
    assert await next_message(second) == "snapshot_request"
    await first.write(pb.WorkerMessage(load=pb.GroupLoad()))
    with pytest.raises(GroupUnavailableError, match="another link"):
        await next_message(first)
    state = await stub.GetState(pb.GetStateRequest())
    assert [group.hello.generation for group in state.groups] == [2]
    second.cancel()


async def test_a_silent_group_is_dropped_and_may_come_back(stub: scheduler_pb2_grpc.SchedulerStub) -> None:
    call = stub.Connect()
    await call.write(hello())
    assert await next_message(call) == "snapshot_request"
    await asyncio.sleep(0.8)
    assert not (await stub.GetState(pb.GetStateRequest())).groups
    await call.write(pb.WorkerMessage(load=pb.GroupLoad()))
    with pytest.raises(GroupUnavailableError, match="silent"):
        await next_message(call)
    again = stub.Connect()
    await again.write(hello())
    assert await next_message(again) == "snapshot_request"
    again.cancel()


async def test_place_and_finished(stub: scheduler_pb2_grpc.SchedulerStub) -> None:
    call = stub.Connect()
    await call.write(hello(generation=7))
    assert await next_message(call) == "snapshot_request"
    request = pb.PlaceRequest(request_id="r", block_hashes=b"".join(HASHES), num_tokens=13, max_tokens=5, tenant="t")
    answer = await stub.Place(request)
    assert (answer.group.group, answer.group.address, answer.generation) == ("a", "a:1", 7)
    failed = pb.GroupProcess(group="a", generation=7)
    assert answer.decision == "explore"
    with transport_errors():
        await stub.Finished(pb.FinishedRequest(request_id="r", output_tokens=5))
    with pytest.raises(NotFoundError), transport_errors():
        await stub.Finished(pb.FinishedRequest(request_id="r"))
    with pytest.raises(GroupUnavailableError), transport_errors():
        await stub.Place(pb.PlaceRequest(request_id="s", num_tokens=1, excluded=[failed]))
    successor = stub.Connect()
    await successor.write(hello(generation=8))
    assert await next_message(successor) == "snapshot_request"
    again = await stub.Place(pb.PlaceRequest(request_id="s", num_tokens=1, excluded=[failed]))
    assert (again.group.group, again.generation) == ("a", 8)
    call.cancel()
    successor.cancel()
