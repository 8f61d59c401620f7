"""The engine's thread and its asyncio face."""

from __future__ import annotations

import asyncio

import pytest

from preble_jax.engine.service import EngineService
from preble_jax.errors import GroupUnavailableError, InvalidRequestError, PromptTooLongError
from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams


def make_request(name, prompt=(1, 2, 3), max_tokens=5, **more):
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return Request(request_id=name, prompt_token_ids=list(prompt), sampling=sampling, **more)


@pytest.fixture
async def service(make_engine):
    engine = make_engine()
    service = EngineService(engine)
    service.start(asyncio.get_running_loop())
    yield service
    service.close()
    engine.scheduler.validate()


def num_tokens(outputs):
    """An output may bring several: those of a dispatch."""
    return sum(len(output.token_ids) for output in outputs)


async def collect(service, request):
    return [output async for output in service.submit(request)]


async def until_idle(service):
    while service.load().num_running or service.load().num_waiting:
        await asyncio.sleep(0.001)


async def test_streams_side_by_side(service):
    results = await asyncio.gather(*[collect(service, make_request(str(i), [i] * 30)) for i in range(10)])
    for outputs in results:
        assert num_tokens(outputs) == 5
        assert [output.finish_reason for output in outputs] == [None] * (len(outputs) - 1) + ["length"]
    load = service.load()
    assert (load.num_running, load.num_waiting, load.finished) == (0, 0, 10)
    assert (load.prompt_tokens, load.output_tokens) == (300, 50)
    assert load.free_pages + load.cached_pages == load.num_pages


async def test_leaving_a_stream_frees_its_pages_within_a_step(service):
    stream = service.submit(make_request("a", [9] * 40, 900))
    await anext(stream)
    assert service.load().num_running == 1
    await stream.aclose()
    dispatches = service._engine.ledger.dispatches
    await until_idle(service)
    load = service.load()
    # The two that were under way, and the one that may have been planned before the command came.
    assert service._engine.ledger.dispatches <= dispatches + 3
    assert load.free_pages + load.cached_pages == load.num_pages
    assert load.cached_pages <= 900 // 8


async def test_cancelling_the_task_cancels_the_request(service):
    task = asyncio.create_task(collect(service, make_request("a", [9] * 40, 900)))
    while not service.load().num_running:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_idle(service)
    assert service.load().finished == 0
    assert num_tokens(await collect(service, make_request("a"))) == 5  # the name is free again


async def test_bad_requests_cost_nobody_else_anything(service):
    good = asyncio.create_task(collect(service, make_request("good", [4] * 20, 50)))
    for prompt, error in (([], InvalidRequestError), ([1] * 1024, PromptTooLongError), ([256], InvalidRequestError)):
        with pytest.raises(error):
            await collect(service, make_request("bad", prompt))
    assert num_tokens(await good) == 50
    assert await collect(service, make_request("bad"))


async def test_the_same_name_twice_is_refused(service):
    stream = service.submit(make_request("a", max_tokens=200))
    await anext(stream)
    with pytest.raises(InvalidRequestError, match="expected a new one, got 'a'"):
        await anext(service.submit(make_request("a")))
    await stream.aclose()


async def test_deadline(service):
    outputs = await collect(service, make_request("a", [3] * 20, 900, deadline_s=service._engine.clock() + 0.05))
    assert outputs[-1].finish_reason == "deadline"


async def test_drain_lets_running_requests_end_and_takes_no_new_ones(service):
    running = asyncio.create_task(collect(service, make_request("a", max_tokens=50)))
    while not service.load().num_running:
        await asyncio.sleep(0.001)
    service.drain()
    with pytest.raises(GroupUnavailableError, match="drains"):
        await collect(service, make_request("b"))
    await service.drained()
    assert num_tokens(await running) == 50


async def test_events_and_snapshots_agree(service):
    await collect(service, make_request("a", range(40)))
    await until_idle(service)
    batch = service.take_events()
    assert batch.first_seq == 0
    assert service.take_events() is None
    hashes = [h for event in batch.events for h in event.hashes]
    snapshot = await service.snapshot()
    assert snapshot.next_seq == len(batch.events)
    assert [h for stored in snapshot.stored for h in stored.hashes] == hashes
    assert len(hashes) == service.load().cached_pages == 5
    assert await service.reset_prefix_cache()
    assert service.take_events().first_seq == snapshot.next_seq


async def test_closing_ends_open_streams_with_an_error(make_engine):
    service = EngineService(make_engine())
    service.start(asyncio.get_running_loop())
    stream = service.submit(make_request("a", max_tokens=900))
    await anext(stream)
    await asyncio.to_thread(service.close)
    outputs = [output async for output in stream]
    assert outputs[-1].finish_reason == "error"
    assert "stopped" in outputs[-1].error


async def test_a_step_gives_its_page_arrays_away(make_engine):
    """Donated: the arrays from before a step are gone, and no step holds a second copy of the pages."""
    engine = make_engine()
    before = engine.runner.pages
    engine.add(make_request("a", max_tokens=1))
    engine.step()
    assert all(pages.is_deleted() for pages in before)
    for program in engine.runner.programs.values():
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= sum(pages.nbytes for pages in engine.runner.pages)
