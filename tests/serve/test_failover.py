"""A process that dies or drains costs as little as it can."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from fakes.deployment import Deployment, until
from preble_jax.errors import GroupUnavailableError
from preble_jax.kv.hashing import block_hashes, cache_salt
from preble_jax.sampling_params import SamplingParams
from serve.protos.preble.v1 import worker_pb2, worker_pb2_grpc
from serve.router import POLL_S
from serve.transport import open_channel

PROMPT = "the quick brown fox"
GREEDY = SamplingParams(max_tokens=9, temperature=0.0)


def hold_all(deployment: Deployment, after: int) -> None:
    for engine in deployment.engines.values():
        engine.hold_after = after


async def the_group_at_work(deployment: Deployment) -> str:
    await until(lambda: len(deployment.running) == 1)
    [group] = deployment.running.values()
    return group


async def test_a_worker_that_dies_before_the_first_token_is_replaced(deployment: Deployment) -> None:
    hold_all(deployment, 0)
    answer = asyncio.create_task(deployment.client.generate(PROMPT, GREEDY))
    dead = await the_group_at_work(deployment)
    for group, engine in deployment.engines.items():
        if group != dead:
            engine.hold_after = None
    await deployment.kill_worker(dead)
    assert (await answer).text == "the quick"
    assert (await answer).usage.group != dead


async def test_a_worker_that_dies_after_the_first_token_is_reported(deployment: Deployment) -> None:
    hold_all(deployment, 2)
    async with aclosing(deployment.client.stream(PROMPT, GREEDY)) as stream:
        assert (await anext(stream)).text == "t"
        assert (await anext(stream)).text == "h"
        dead = await the_group_at_work(deployment)
        await deployment.kill_worker(dead)
        with pytest.raises(GroupUnavailableError, match=f"{dead} failed after 2 tokens"):
            await anext(stream)
    hold_all(deployment, 1000)
    answers = await asyncio.gather(*(deployment.client.generate(PROMPT, GREEDY) for _ in range(4)))
    assert {answer.text for answer in answers} == {"the quick"}
    await deployment.until_state(lambda groups: dead not in groups)
    assert all(group.num_outstanding == 0 for group in (await deployment.state()).values())


async def test_an_engine_that_stops_fails_its_worker_and_its_requests_only(deployment: Deployment) -> None:
    hold_all(deployment, 2)
    async with aclosing(deployment.client.stream(PROMPT, GREEDY)) as stream:
        await anext(stream)
        await anext(stream)
        broken = await the_group_at_work(deployment)
        deployment.engines[broken].stopped = True
        deployment.engines[broken].resume()
        with pytest.raises(GroupUnavailableError, match="out of memory"):
            await anext(stream)
    assert {group for group, worker in deployment.workers.items() if worker.failed.is_set()} == {broken}
    hold_all(deployment, 1000)
    assert (await deployment.client.generate(PROMPT, GREEDY)).usage.group != broken


async def test_when_no_group_is_left_the_client_is_told(deployment: Deployment) -> None:
    for group in deployment.engines:
        await deployment.kill_worker(group)
    with pytest.raises(GroupUnavailableError, match="none is left"):
        await deployment.client.generate(PROMPT, GREEDY)


async def test_a_group_that_drains_finishes_its_work_and_gets_no_more(deployment: Deployment) -> None:
    hold_all(deployment, 1)
    answer = asyncio.create_task(deployment.client.generate(PROMPT, GREEDY))
    drained = await the_group_at_work(deployment)
    async with open_channel(deployment.workers[drained].address) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Drain(worker_pb2.DrainRequest())
        await deployment.until_state(lambda groups: groups[drained].draining)
        hold_all(deployment, 1000)
        others = [await deployment.client.generate(PROMPT, GREEDY) for _ in range(4)]
        assert drained not in {other.usage.group for other in others}
        assert not call.done()
        deployment.engines[drained].resume()
        await call
    assert (await answer).text == "the quick"
    assert not deployment.workers[drained].failed.is_set()


async def test_without_a_scheduler_equal_beginnings_still_meet(deployment: Deployment) -> None:
    await deployment.stop_scheduler()
    prompts = [f"{beginning * 20} {ending}" for beginning in "abcdefgh" for ending in ("one", "two", "three")]
    answers = await asyncio.gather(*(deployment.client.generate(prompt, GREEDY) for prompt in prompts))
    groups = [answer.usage.group for answer in answers]
    for family in range(8):
        assert len(set(groups[3 * family : 3 * family + 3])) == 1
    assert set(groups) == set(deployment.engines)


async def test_without_a_scheduler_a_dead_group_is_gone_round(deployment: Deployment) -> None:
    await deployment.stop_scheduler()
    dead = (await deployment.client.generate(PROMPT, GREEDY)).usage.group
    await deployment.kill_worker(dead)
    answer = await deployment.client.generate(PROMPT, GREEDY)
    assert answer.text == "the quick"
    assert answer.usage.group != dead


async def test_a_scheduler_that_knows_nobody_yet_is_gone_round_too(deployment: Deployment) -> None:
    await deployment.cut_links()
    await asyncio.sleep(1.2 * POLL_S)  # the frontend has asked, and was told of no group
    assert (await deployment.client.generate(PROMPT, GREEDY)).text == "the quick"


async def test_a_new_scheduler_learns_what_the_groups_hold(deployment: Deployment) -> None:
    holder = (await deployment.client.generate(PROMPT, GREEDY)).usage.group
    num_blocks = len(block_hashes(PROMPT.encode(), 4, cache_salt("fake")))
    await deployment.stop_scheduler()
    await deployment.restart_scheduler()
    await deployment.until_state(lambda groups: holder in groups and groups[holder].held_pages == num_blocks)
    await deployment.until_joined(2)
    answer = await deployment.client.generate(PROMPT, GREEDY)
    assert (answer.usage.group, answer.usage.cached_tokens) == (holder, 16)
    assert (await deployment.state())[holder].decisions["exploit"] == 1


async def test_a_restarted_worker_joins_again(deployment: Deployment) -> None:
    await deployment.kill_worker("worker-1")
    await deployment.until_state(lambda groups: set(groups) == {"worker-0"})
    await deployment.start_worker("worker-1")
    await deployment.until_joined(2)
    await deployment.kill_worker("worker-0")
    assert (await deployment.client.generate(PROMPT, GREEDY)).usage.group == "worker-1"


async def test_who_waits_through_a_rolling_restart_is_served_by_a_new_process(deployment: Deployment) -> None:
    hold_all(deployment, 0)
    answer = asyncio.create_task(deployment.client.generate(PROMPT, GREEDY))
    first = await the_group_at_work(deployment)
    [second] = deployment.engines.keys() - {first}
    await deployment.kill_worker(first)
    await until(lambda: set(deployment.running.values()) == {second})
    engine = deployment.engines[first]
    engine.info = replace(engine.info, generation=engine.info.generation + 1)
    engine.hold_after = None
    await deployment.start_worker(first)
    await deployment.until_state(lambda groups: first in groups and groups[first].hello.generation == 2)
    await deployment.kill_worker(second)
    assert ((await answer).text, (await answer).usage.group) == ("the quick", first)
