"""Two real workers under D2LPM and DLPM: a tenant that floods the cluster does not stand in the way of a modest one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from preble_jax.progress import NullProgress
from preble_jax.sampling_params import SamplingParams
from serve.client import AsyncClient
from serve.cluster import Cluster
from serve.protos.preble.v1 import scheduler_pb2, scheduler_pb2_grpc
from serve.transport import open_channel

# As in test_cluster.py, so that compiled programs are found in the cache. A request of about 64 tokens and 8 of output
# is 80 units of service: with these quanta a tenant gets two of them a refill.
SMALL = {
    "model.max_model_len": "512",
    "kv.num_pages": "64",
    "engine.max_num_seqs": "2",
    "engine.prefill_buckets": "64",
    "serve.groups": "2",
    "serve.frontend_port": "0",
    "serve.scheduler_port": "0",
    "serve.worker_port": "0",
    "serve.report_interval_s": "0.05",
}
FAIR = {
    "sched.placement": "d2lpm",
    "sched.d2lpm_quantum_tokens": "160",
    "queue.policy": "dlpm",
    "queue.dlpm_quantum": "160",
}
NUM_GREEDY, NUM_MODEST = 40, 4
SAMPLING = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


async def flood(address: str) -> list[str]:
    """Tenants of the answers, in the order in which they ended. The modest one asks after the flood has come."""
    ended: list[str] = []
    async with AsyncClient(address) as client, asyncio.TaskGroup() as requests:

        async def ask(tenant: str, number: int) -> None:
            await client.generate(f"{tenant} {number} " + "counts its many blessings " * 8, SAMPLING, tenant=tenant)
            ended.append(tenant)

        for number in range(NUM_GREEDY):
            requests.create_task(ask("greedy", number))
        while len(ended) < 2:
            await asyncio.sleep(0.01)
        for number in range(NUM_MODEST):
            requests.create_task(ask("modest", number))
    return ended


async def state_of(address: str) -> scheduler_pb2.GetStateResponse:
    async with open_channel(address) as channel:
        return await scheduler_pb2_grpc.SchedulerStub(channel).GetState(scheduler_pb2.GetStateRequest())


def test_a_greedy_tenant_does_not_hold_up_a_modest_one(default_model: Path, tmp_path: Path) -> None:
    overrides = {**SMALL, **FAIR, "model.name": str(default_model)}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)
        with Cluster(None, overrides, run_dir=tmp_path, progress=NullProgress(), echo=lambda line: None) as cluster:
            ended = asyncio.run(flood(cluster.frontend_address))
            state = asyncio.run(state_of(cluster.scheduler_address))

    assert len(ended) == NUM_GREEDY + NUM_MODEST
    last_modest = len(ended) - ended[::-1].index("modest")
    # First come first served, the modest ones would be last: all 40 of the others were there before them.
    assert ended[last_modest:].count("greedy") > NUM_GREEDY // 2, "most of the flood was served after them"

    assert state.placement == "d2lpm"
    assert {group.hello.queue for group in state.groups} == {"dlpm"}
    service = {"greedy": 0, "modest": 0}
    for group in state.groups:
        for tenant in group.load.tenants:
            service[tenant.tenant] += tenant.extend_tokens + 2 * tenant.output_tokens
    assert service["greedy"] > 5 * service["modest"] > 0
