"""Groups that die, drain and come back, and a scheduler that hears late."""

from __future__ import annotations

import pytest

from fakes.sim import LinearCost, shared_workload
from preble_jax.config import SchedSettings
from preble_jax.sched import GlobalScheduler
from preble_jax.sim.request import SimRequest, Workload
from preble_jax.sim.settings import Fault, SimSettings
from preble_jax.sim.simulator import Simulator


def simulate(requests, *faults, **changes):
    """faults: (at_s, group, kind). Returns (result, simulator)."""
    settings = SimSettings(
        **{
            "num_groups": 2,
            "page_size": 8,
            "sched": SchedSettings(placement="round_robin"),
            "faults": tuple(Fault(at_s=at_s, group=group, kind=kind) for at_s, group, kind in faults),
            **changes,
        }
    )
    simulator = Simulator(settings, LinearCost())
    workload = requests if isinstance(requests, Workload) else Workload(name="w", block_size=8, requests=requests)
    result = simulator.run(workload)
    simulator.validate()
    return result, simulator


def every(interval_s, num, **changes):
    return [
        SimRequest(**{"arrival_s": interval_s * i, "num_prompt": 16, "num_output": 4, "blocks": (1, 2), **changes})
        for i in range(num)
    ]


def test_a_killed_groups_requests_are_tried_elsewhere_unless_they_have_tokens():
    requests = [
        SimRequest(arrival_s=0.0, num_prompt=64, num_output=50),  # one on each group: they have tokens by then
        SimRequest(arrival_s=0.0, num_prompt=64, num_output=50),
        SimRequest(arrival_s=0.49, num_prompt=2000, num_output=5),  # these have none
        SimRequest(arrival_s=0.49, num_prompt=2000, num_output=5),
    ]
    result, simulator = simulate(requests, (0.5, 0, "kill"))
    dead = simulator.groups[0].name
    lost = next(record for record in result.requests[:2] if record.group == dead)
    kept = next(record for record in result.requests[:2] if record.group != dead)
    assert (lost.status, kept.status) == ("failed", "finished")
    assert 0 < lost.made_tokens < 50
    assert lost.finished_s is None
    assert [record.status for record in result.requests[2:]] == ["finished", "finished"]
    assert sorted(record.num_placements for record in result.requests[2:]) == [1, 2]
    assert {record.group for record in result.requests[2:]} == {kept.group}
    assert simulator.scheduler.num_outstanding == 0
    assert sum(output for _, _, _, output in result.served) == 50 + lost.made_tokens + 10


def test_nothing_goes_to_a_dead_group_until_it_is_restarted_with_nothing_cached():
    result, simulator = simulate(every(0.1, 60), (1.099, 0, "kill"), (3.05, 0, "restart"))
    dead = simulator.groups[0].name
    on_dead = [record for record in result.requests if record.group == dead]
    assert {record.status for record in result.requests} == {"finished"}
    assert not [record for record in on_dead if 1.099 < record.sent_s < 3.05]
    assert {record.num_placements for record in result.requests} == {1}  # the scheduler knows
    before = [record.cached_tokens for record in on_dead if record.sent_s < 1.099]
    after = [record.cached_tokens for record in on_dead if record.sent_s > 3.05]
    assert before[0] == after[0] == 0
    assert set(before[1:]) == set(after[1:]) == {8}
    assert simulator.groups[0].generation == 2


def test_a_restart_of_a_group_that_runs_kills_it_first():
    result, simulator = simulate(every(0.1, 10, num_output=100), (0.5, 0, "restart"))
    statuses = {record.status for record in result.requests if record.group == simulator.groups[0].name}
    assert statuses == {"failed", "finished"}


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_who_waits_through_a_rolling_restart_is_served_by_a_new_process(num_groups):
    requests = [SimRequest(arrival_s=0.0, num_prompt=3000, num_output=5) for _ in range(2 * num_groups)]
    faults = [(0.1 * (1 + number), number % num_groups, "restart") for number in range(2 * num_groups)]
    result, _ = simulate(requests, *faults, num_groups=num_groups)
    assert {record.status for record in result.requests} == {"finished"}
    assert max(record.num_placements for record in result.requests) > num_groups


def test_no_process_is_tried_twice():
    """The scheduler has not heard that two of three drain, and hashing names one of them again and again."""
    requests = [
        SimRequest(arrival_s=1.0 + 0.1 * i, num_prompt=16, num_output=4, blocks=(2 * i, 2 * i + 1)) for i in range(20)
    ]
    sched = SchedSettings(placement="consistent_hashing")
    faults = [(0.5, group, "drain") for group in (0, 1)]
    result, simulator = simulate(requests, *faults, num_groups=3, sched=sched, event_lag_s=5.0)
    assert {(record.status, record.group) for record in result.requests} == {("finished", simulator.groups[2].name)}
    assert max(record.num_placements for record in result.requests) == 3


def test_what_a_dead_group_computed_in_vain_is_nobodys_service():
    requests = [
        SimRequest(arrival_s=0.0, num_prompt=2000, num_output=5, tenant=tenant) for tenant in ("a", "b", "c", "d")
    ]
    result, _ = simulate(requests, (0.1, 0, "kill"))
    again = {record.tenant for record in result.requests if record.num_placements == 2}
    assert 0 < len(again) < 4
    for record in result.requests:
        extend = sum(tokens for _, tenant, tokens, _ in result.served if tenant == record.tenant)
        assert extend == 2000 == record.num_prompt - record.cached_tokens
    assert [at_s for at_s, *_ in result.served] == sorted(at_s for at_s, *_ in result.served)


def test_without_a_group_requests_fail():
    result, _ = simulate(every(0.5, 10), (1.2, 0, "kill"), (1.2, 1, "kill"), (3.2, 1, "restart"))
    statuses = [record.status for record in result.requests]
    assert statuses == ["finished"] * 3 + ["failed"] * 4 + ["finished"] * 3


@pytest.mark.parametrize("network_s", [0.0, 0.15])
@pytest.mark.parametrize("lag_s", [0.0, 0.3])
def test_a_draining_group_ends_what_it_has_and_takes_nothing_new(lag_s, network_s):
    requests = [*every(0.0, 2, num_output=80), *every(0.1, 40)[1:]]
    result, simulator = simulate(
        requests, (1.05, 0, "drain"), (3.05, 0, "undrain"), event_lag_s=lag_s, network_s=network_s
    )
    drained = simulator.groups[0].name
    assert {record.status for record in result.requests} == {"finished"}
    first = next(record for record in result.requests[:2] if record.group == drained)
    assert 1.05 < first.finished_s < 3.05
    here = [record for record in result.requests if record.group == drained]
    assert not [record for record in here if 1.05 < record.sent_s + network_s < 3.05]
    after = [record for record in here if record.sent_s > 3.05]
    assert after
    assert {record.cached_tokens for record in after} == {8}  # its tree is what it was
    num_placements = {record.num_placements for record in result.requests}
    assert num_placements == ({1, 2} if lag_s or network_s else {1})
    assert simulator.groups[0].ledger.record.num_preemptions == 0


def test_a_drain_that_is_heard_of_late_does_not_outlive_its_end():
    result, simulator = simulate(every(0.1, 40), (1.05, 0, "drain"), (1.15, 0, "undrain"), event_lag_s=0.3)
    back = [record for record in result.requests if record.sent_s > 2.0]
    assert {record.group for record in back} == {group.name for group in simulator.groups}


def test_faults_of_groups_that_are_not_in_the_state_for_them_change_nothing():
    plain, _ = simulate(every(0.1, 30))
    odd, _ = simulate(every(0.1, 30), (1.0, 0, "undrain"), (9.0, 0, "kill"))
    assert plain.requests == odd.requests
    twice, _ = simulate(every(0.1, 30), (1.0, 0, "kill"), (1.5, 0, "kill"), (1.7, 0, "drain"), (1.8, 0, "undrain"))
    once, _ = simulate(every(0.1, 30), (1.0, 0, "kill"))
    assert twice.requests == once.requests


def test_what_the_scheduler_hears_late_changes_its_choices():
    """With no optimistic entries to go by, a prefix is known on a group when its events have come."""
    requests = every(0.4, 12, num_prompt=160, blocks=tuple(range(20)))
    sched = SchedSettings(placement="e2", optimistic_ttl_s=0.01)
    at_once, _ = simulate(requests, sched=sched)
    late, _ = simulate(requests, sched=sched, event_lag_s=100.0)
    assert [record.decision for record in at_once.requests].count("exploit") == 11
    assert [record.decision for record in late.requests].count("exploit") == 0


def test_a_scheduler_that_hears_nothing_for_long_takes_groups_for_lost_and_lets_them_join_again():
    result, simulator = simulate(every(0.1, 200), event_lag_s=8.0)
    assert {record.status for record in result.requests} == {"finished"}
    assert {record.group for record in result.requests} == {group.name for group in simulator.groups}


def test_a_draining_group_that_joins_again_still_drains():
    """What it says arrives after 8 s, so that it is taken for lost after 5 and told to say hello."""
    result, simulator = simulate(every(0.1, 120), (1.05, 0, "drain"), event_lag_s=8.0)
    drained = simulator.groups[0].name
    assert not [record for record in result.requests if record.group == drained and record.sent_s > 1.05]
    refused = [record.sent_s for record in result.requests if record.num_placements > 1]
    assert refused and max(refused) < 5.5


def test_many_faults_and_everybody_ends_once():
    kinds = ("kill", "restart", "drain", "undrain")
    faults = [(0.13 * i, i * 7 % 3, kinds[i * 5 % 4]) for i in range(1, 40)]
    workload = shared_workload(250, 50, prompt=300)
    settings = {"num_groups": 3, "sched": SchedSettings(placement="e2"), "kv_tokens": 1024}
    result, simulator = simulate(workload, *faults, **settings, event_lag_s=0.05, network_s=0.01)
    statuses = {record.status for record in result.requests}
    assert statuses == {"finished", "failed"}
    assert all(record.made_tokens == record.num_output for record in result.requests if record.status == "finished")
    again, _ = simulate(workload, *faults, **settings, event_lag_s=0.05, network_s=0.01)
    assert again.requests == result.requests
    assert simulator.frontend.num_open == 0


def test_every_try_is_placed_with_its_tenants_budget(monkeypatch):
    told = {}
    place = GlobalScheduler.place

    def note(self, request, now):
        told[request.request_id] = request.max_tokens
        return place(self, request, now)

    monkeypatch.setattr(GlobalScheduler, "place", note)
    requests = [
        SimRequest(arrival_s=0.0, num_prompt=2000, num_output=num_output, tenant=tenant)
        for num_output, tenant in ((5, "long"), (300, "long"), (5, "short"), (7, "short"))
    ]
    result, _ = simulate(requests, (0.1, 0, "kill"))
    assert [record.num_placements for record in result.requests].count(2) == 2
    assert sorted(told) == sorted([*"0123", *(f"{r.index}.1" for r in result.requests if r.num_placements == 2)])
    assert all(budget == (300 if name[0] in "01" else 128) for name, budget in told.items())
