"""Every placement policy serves, chosen by nothing but the configuration, and the cluster says which is on."""

from __future__ import annotations

import asyncio
import typing
from dataclasses import replace

import pytest

from fakes.deployment import CONFIG, Deployment
from preble_jax.config import QueueSettings, SchedSettings
from preble_jax.sampling_params import SamplingParams
from serve.protos.preble.v1 import scheduler_pb2, scheduler_pb2_grpc
from serve.transport import open_channel

GREEDY = SamplingParams(max_tokens=3, temperature=0.0)
PLACEMENTS = typing.get_args(typing.get_type_hints(SchedSettings)["placement"])
QUEUES = typing.get_args(typing.get_type_hints(QueueSettings)["policy"])


async def state_of(address: str) -> scheduler_pb2.GetStateResponse:
    async with open_channel(address) as channel:
        return await scheduler_pb2_grpc.SchedulerStub(channel).GetState(scheduler_pb2.GetStateRequest())


def test_there_are_policies_to_choose_from() -> None:
    assert {"default", "least_added_delay", "e2", "d2lpm", "round_robin", "lmetric"} <= set(PLACEMENTS)
    assert {"fair", "priority_groups", "dlpm", "vtc", "lpm", "fcfs"} == set(QUEUES)


@pytest.mark.parametrize("placement", PLACEMENTS)
async def test_a_placement_policy_serves(placement: str) -> None:
    config = replace(CONFIG, sched=SchedSettings(placement=placement))  # type: ignore[arg-type]
    async with Deployment(config=config) as deployment:
        prompts = [f"{family * 20} {number}" for family in "abc" for number in range(4)]
        answers = await asyncio.gather(*(deployment.client.generate(prompt, GREEDY) for prompt in prompts))
        assert [answer.text for answer in answers] == [prompt[:3] for prompt in prompts]
        assert deployment.frontend._router.num_fallbacks == 0, "the scheduler placed all of them"
        await deployment.until_state(lambda groups: not any(group.num_outstanding for group in groups.values()))
        state = await state_of(deployment.scheduler.address)
        assert state.placement == ("least_added_delay" if placement == "default" else placement)
        assert sum(sum(group.decisions.values()) for group in state.groups) == len(prompts)


@pytest.mark.parametrize("queue", QUEUES)
async def test_a_group_says_which_queue_it_has(queue: str) -> None:
    config = replace(CONFIG, queue=QueueSettings(policy=queue))  # type: ignore[arg-type]
    async with Deployment(1, config) as deployment:
        assert (await state_of(deployment.scheduler.address)).groups[0].hello.queue == queue
