"""Many decode steps at a time give what single steps give, bit by bit."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fakes.sim import LinearCost, shared_workload
from preble_jax.config import QueueSettings, SchedSettings, TenantSettings
from preble_jax.sched.local_scheduler import LocalScheduler
from preble_jax.sim.request import SimRequest, Workload
from preble_jax.sim.settings import Fault, SimSettings
from preble_jax.sim.simulator import Simulator

PLACEMENTS = get_args(get_type_hints(SchedSettings)["placement"])
QUEUES = get_args(get_type_hints(QueueSettings)["policy"])
UNEVEN = TenantSettings(weights=(("tenant-0", 0.3), ("tenant-1", 1.7)), output_weight=1.1)


def run(workload, cost, **changes):
    simulator = Simulator(SimSettings(**{"num_groups": 2, "page_size": 4, **changes}), cost)
    result = simulator.run(workload)
    simulator.validate()
    outcome = (result.requests, result.groups, result.served, result.end_s, result.policy)
    state = []
    for group in simulator.groups:
        if group.up:
            known = simulator.scheduler.blocks(group.name, confirmed_only=True)
            held = list(group.cache.tree.chains())
            deficits = dict(group.scheduler.tenant_deficits())
            state.append((known, held, group.ledger.totals, deficits))
    return outcome, state


@settings(max_examples=40, deadline=None)
@given(
    num=st.integers(1, 40),
    rate=st.sampled_from([2.0, 8.0, 30.0]),
    seed=st.integers(0, 1000),
    output=st.sampled_from([8, 40]),
    kv_tokens=st.sampled_from([256, 600, 4096]),
    base_s=st.sampled_from([0.011, 0.0123, 0.02]),
    context_s=st.sampled_from([-1e-6, 0.0, 1e-6]),
    policy=st.tuples(st.sampled_from(PLACEMENTS), st.sampled_from(QUEUES)),
    lag_s=st.sampled_from([0.0, 0.0317]),
    decode_steps=st.sampled_from([1, 8]),
    faults=st.lists(
        st.tuples(st.floats(0.0, 4.0), st.integers(0, 1), st.sampled_from(["kill", "restart", "drain", "undrain"])),
        max_size=5,
    ),
    horizon_s=st.sampled_from([None, 2.345]),
    tenants=st.sampled_from([UNEVEN, TenantSettings()]),
    turns=st.sampled_from([1, 3]),
)
@example(  # a dispatch of several steps, made before they became too long for that
    num=10,
    rate=8.0,
    seed=249,
    output=40,
    kv_tokens=600,
    base_s=0.011,
    context_s=0.0,
    policy=("e2", "priority_groups"),
    lag_s=0.0,
    decode_steps=8,
    faults=[],
    horizon_s=None,
    tenants=UNEVEN,
    turns=1,
)
@example(  # what a deployment has when nobody says otherwise, with preemptions
    num=30,
    rate=30.0,
    seed=5,
    output=40,
    kv_tokens=256,
    base_s=0.011,
    context_s=1e-6,
    policy=("default", "fair"),
    lag_s=0.0317,
    decode_steps=8,
    faults=[],
    horizon_s=None,
    tenants=UNEVEN,
    turns=3,
)
def test_a_coast_is_single_steps(
    num,
    rate,
    seed,
    output,
    kv_tokens,
    base_s,
    context_s,
    policy,
    lag_s,
    decode_steps,
    faults,
    horizon_s,
    tenants,
    turns,
):
    workload = shared_workload(-(-num // turns), rate, seed=seed, prompt=60, output=output, block_size=4, turns=turns)
    cost = LinearCost(base_s=base_s, context_s=context_s, kv_tokens=kv_tokens)
    changes = {
        "sched": SchedSettings(placement=policy[0], optimistic_ttl_s=0.5),
        "queue": QueueSettings(policy=policy[1]),
        "event_lag_s": lag_s,
        "report_interval_s": 0.2317,
        "decode_steps": decode_steps,
        "faults": tuple(Fault(at_s=at_s, group=group, kind=kind) for at_s, group, kind in faults),
        "horizon_s": horizon_s,
        "tenants": tenants,
    }
    assert run(workload, cost, **changes) == run(workload, cost, **changes, coast=False)


def test_a_coast_plans_a_few_steps_of_many(monkeypatch):
    num_plans = [0]
    schedule = LocalScheduler.schedule

    def counted(self, now, max_steps=1):
        num_plans[0] += 1
        return schedule(self, now, max_steps)

    monkeypatch.setattr(LocalScheduler, "schedule", counted)
    requests = [SimRequest(arrival_s=0.0, num_prompt=20, num_output=1000) for _ in range(4)]
    workload = Workload(name="w", block_size=4, requests=requests)
    cost = LinearCost(kv_tokens=10_000)
    outcomes = []
    for coast in (True, False):
        num_plans[0] = 0
        outcomes.append(run(workload, cost, coast=coast, num_groups=1))
        assert (num_plans[0] < 20) == coast
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("at_s", [0.5, 0.5217, 0.9, 1.5])
def test_who_comes_in_the_middle_is_seen_when_the_step_ends(at_s):
    requests = [
        SimRequest(arrival_s=0.0, num_prompt=20, num_output=200),
        SimRequest(arrival_s=at_s, num_prompt=30, num_output=2),
    ]
    workload = Workload(name="w", block_size=4, requests=requests)
    coasted, single = (run(workload, LinearCost(), coast=coast, num_groups=1) for coast in (True, False))
    assert coasted == single
    newcomer = coasted[0][0][1]
    assert 0 < newcomer.queue_s < 0.021  # the rest of the step that runs; then it goes behind the next one


def test_steps_that_become_short_share_a_dispatch_again():
    requests = [SimRequest(arrival_s=0.1 * i, num_prompt=20, num_output=300) for i in range(2)]
    workload = Workload(name="w", block_size=4, requests=requests)
    cost = LinearCost(base_s=0.014, context_s=-1e-5)
    (coasted, _), (single, _) = (run(workload, cost, coast=coast, num_groups=1) for coast in (True, False))
    assert coasted == single
