"""The simulator: its loop against a naive one, what must hold of every run, and determinism."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.sim import LinearCost, shared_workload
from oracles.naive_engine_loop import Job
from oracles.naive_engine_loop import run as run_naive
from preble_jax.config import QueueSettings, SchedSettings, TenantSettings
from preble_jax.errors import ConfigError, InvalidRequestError
from preble_jax.sched import GlobalScheduler
from preble_jax.sim.cost.base import StepWork
from preble_jax.sim.request import SimRequest, Workload
from preble_jax.sim.settings import Fault, SimSettings
from preble_jax.sim.simulator import Simulator


def simulate(workload, cost=None, **changes):
    simulator = Simulator(SimSettings(**{"num_groups": 3, "page_size": 8, **changes}), cost or LinearCost())
    result = simulator.run(workload)
    simulator.validate()
    check(workload, result, simulator)
    assert simulator.scheduler.num_outstanding == 0
    return result


def check(workload, result, simulator):
    """What holds of every run that was not stopped."""
    assert [record.index for record in result.requests] == list(range(len(workload.requests)))
    capacity = simulator.groups[0].limits.max_model_len
    for record, request in zip(result.requests, workload.requests, strict=True):
        assert record.status in ("finished", "failed", "rejected")
        assert record.sent_s >= request.arrival_s
        if record.status == "finished":
            assert record.made_tokens == min(request.num_output, capacity - request.num_prompt)
            assert record.sent_s < record.first_token_s <= record.finished_s <= result.end_s
            assert 0 <= record.queue_s < record.first_token_s - record.sent_s
            assert 0 <= record.cached_tokens < record.num_prompt
        else:
            assert record.finished_s is None
    assert [at_s for at_s, _, _, _ in result.served] == sorted(at_s for at_s, _, _, _ in result.served)
    assert sum(output for _, _, _, output in result.served) == sum(record.made_tokens for record in result.requests)
    finished = [record for record in result.requests if record.status == "finished"]
    assert sum(group.num_requests for group in result.groups) == len(finished)
    for group in result.groups:
        assert group.num_requests == sum(record.group == group.group for record in finished)
        assert 0 <= group.busy_s <= result.end_s + 1e-9


def believed(simulator):
    """What the scheduler thinks each group that is up holds, and what it holds, once all reports are in."""
    simulator.settings = replace(simulator.settings, faults=())
    end_s = simulator.events.now + 2 * simulator.settings.report_interval_s + 2 * simulator.settings.event_lag_s
    while simulator.events.next_s <= end_s:
        simulator.events.step()
    for group in simulator.groups:
        if group.up:
            confirmed = simulator.scheduler.blocks(group.name, confirmed_only=True)
            yield confirmed, {block_hash for node in group.cache.tree for block_hash in node.hashes}


@settings(max_examples=60, deadline=None)
@given(
    jobs=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 90), st.integers(1, 9)), min_size=1, max_size=12),
    prefill_tokens=st.sampled_from([16, 50, 200]),
    max_chunks=st.integers(1, 3),
    max_running=st.integers(1, 4),
)
def test_one_group_does_what_the_naive_loop_does(jobs, prefill_tokens, max_chunks, max_running):
    jobs = [Job(at / 97, prompt, output) for at, prompt, output in sorted(jobs)]
    requests = [SimRequest(arrival_s=job.sent_s, num_prompt=job.prompt, num_output=job.output) for job in jobs]
    cost = LinearCost(
        prefill_tokens=prefill_tokens, max_prefill_seqs=max_chunks, max_num_seqs=max_running, kv_tokens=100_000
    )
    base_s, extend_s, row_s, context_s = cost.prices

    def step_s(lengths, chunks):
        return base_s + extend_s * sum(n for n, _ in chunks) + row_s * len(lengths) + context_s * sum(lengths)

    busy_s = run_naive(jobs, step_s, prefill_tokens, max_chunks, max_running)
    result = simulate(
        Workload(name="w", block_size=8, requests=requests),
        cost,
        num_groups=1,
        queue=QueueSettings(policy="fcfs"),
        decode_steps=1,
    )
    for record, job in zip(result.requests, jobs, strict=True):
        assert record.first_token_s == pytest.approx(job.first_s, abs=1e-9)
        assert record.finished_s == pytest.approx(job.finished_s, abs=1e-9)
        assert record.queue_s == pytest.approx(job.queue_s, abs=1e-9)
    assert result.groups[0].busy_s == pytest.approx(busy_s)
    extend_tokens = sum(job.prompt for job in jobs)  # less the last ones that went as rows that decode
    assert extend_tokens - len(jobs) <= result.groups[0].extend_tokens <= extend_tokens
    assert result.groups[0].output_tokens == sum(job.output for job in jobs)


POLICIES = [
    ("default", "fair"),
    ("round_robin", "fcfs"),
    ("e2", "priority_groups"),
    ("d2lpm", "dlpm"),
    ("dynamo_cost", "vtc"),
]


@pytest.mark.parametrize(("placement", "queue"), POLICIES)
def test_the_same_seed_gives_the_same_records(placement, queue):
    changes = {"sched": SchedSettings(placement=placement), "queue": QueueSettings(policy=queue), "seed": 3}
    first, second = (simulate(shared_workload(150, 60), **changes) for _ in range(2))
    assert first.requests == second.requests
    assert first.groups == second.groups
    assert (first.served, first.end_s, first.policy) == (second.served, second.end_s, second.policy)


def test_a_seed_decides_ties():
    groups = {simulate(shared_workload(20, 1), seed=seed).requests[0].group for seed in range(8)}
    assert len(groups) > 1


@pytest.mark.parametrize("lag_s", [0.0, 0.4])
@pytest.mark.parametrize("kv_tokens", [512, 4096])
def test_the_forest_is_the_union_of_the_trees_when_all_reports_are_in(lag_s, kv_tokens):
    faults = (
        Fault(at_s=0.5, group=0, kind="kill"),
        Fault(at_s=0.7, group=1, kind="drain"),
        Fault(at_s=1.5, group=0, kind="restart"),
        Fault(at_s=1.7, group=1, kind="undrain"),
    )
    simulator = Simulator(
        SimSettings(num_groups=3, page_size=8, kv_tokens=kv_tokens, event_lag_s=lag_s, faults=faults), LinearCost()
    )
    result = simulator.run(shared_workload(120, 40))
    assert (sum(group.num_evicted for group in result.groups) > 0) == (kv_tokens == 512)
    trees = list(believed(simulator))
    assert len(trees) == 3
    for confirmed, held in trees:
        assert held
        assert confirmed == held


def test_shared_prefixes_are_computed_once_and_output_is_nobody_elses():
    requests = [SimRequest(arrival_s=3.0 * i, num_prompt=40, num_output=30, blocks=(7, 8, 9)) for i in range(3)]
    simulator = Simulator(SimSettings(num_groups=1, page_size=8), LinearCost())
    result = simulator.run(Workload(name="w", block_size=16, requests=requests))
    # Pages of 8: five full ones, of which the last holds the token whose logits are wanted.
    assert [record.cached_tokens for record in result.requests] == [0, 32, 32]
    assert result.groups[0].extend_tokens == 40 + 2 * 8
    assert len(simulator.groups[0].cache.tree) == 5 + 3 * 3  # of 30 tokens of output, 24 fill pages


def test_short_pages_preempt_and_tokens_are_conserved():
    cost = LinearCost(kv_tokens=64, max_num_seqs=4)
    workload = Workload(
        name="w",
        block_size=8,
        requests=[SimRequest(arrival_s=0.01 * i, num_prompt=8, num_output=40) for i in range(6)],
    )
    result = simulate(workload, cost, num_groups=1)
    assert result.groups[0].num_preemptions > 0
    assert result.groups[0].output_tokens == 6 * 40
    assert result.groups[0].extend_tokens > 6 * 8  # computed again


def test_dispatches_of_many_decode_steps_save_no_work_and_make_newcomers_wait():
    requests = [
        SimRequest(arrival_s=0.0, num_prompt=8, num_output=100),
        SimRequest(arrival_s=0.11, num_prompt=8, num_output=2),
    ]
    workload = Workload(name="w", block_size=8, requests=requests)
    cost = LinearCost(base_s=0.002)
    results = [simulate(workload, cost, num_groups=1, decode_steps=steps) for steps in (1, 8)]
    single, many = (result.requests for result in results)
    assert single[1].first_token_s < many[1].first_token_s
    assert results[0].groups[0].output_tokens == results[1].groups[0].output_tokens == 102
    assert single[0].finished_s == pytest.approx(many[0].finished_s, rel=0.05)


def test_what_cannot_run_is_rejected():
    requests = [
        SimRequest(arrival_s=0.0, num_prompt=5_000, num_output=2),  # more pages than there are
        SimRequest(arrival_s=0.0, num_prompt=4_096, num_output=2),  # no room for a token
        SimRequest(arrival_s=0.0, num_prompt=4_095, num_output=5),  # room for one
    ]
    result = simulate(Workload(name="w", block_size=8, requests=requests))
    assert [record.status for record in result.requests] == ["rejected", "rejected", "finished"]
    assert result.requests[2].made_tokens == 1


def test_overload_is_rejected():
    workload = shared_workload(40, 1_000, tenants=1)
    full = simulate(workload, num_groups=1, queue=QueueSettings(max_waiting=5))
    limited = simulate(workload, num_groups=1, tenants=TenantSettings(max_outstanding=6))
    for result in (full, limited):
        statuses = [record.status for record in result.requests]
        assert 6 <= statuses.count("finished") < 40
        assert statuses.count("rejected") == 40 - statuses.count("finished")


def test_a_follower_is_sent_when_its_predecessor_has_ended():
    requests = [
        SimRequest(arrival_s=0.0, num_prompt=16, num_output=5, blocks=(1, 2)),
        SimRequest(arrival_s=0.0, num_prompt=32, num_output=5, blocks=(1, 2, 3, 4), follows=0, think_s=0.7),
        SimRequest(arrival_s=0.0, num_prompt=5_000, num_output=5, follows=1),
        SimRequest(arrival_s=0.0, num_prompt=8, num_output=5, follows=2),
        SimRequest(arrival_s=9.0, num_prompt=8, num_output=5, follows=0),
    ]
    records = simulate(Workload(name="w", block_size=8, requests=requests), num_groups=1).requests
    assert records[1].sent_s == records[0].finished_s + 0.7
    assert records[1].cached_tokens == 16
    assert [record.status for record in records] == ["finished", "finished", "rejected", "failed", "finished"]
    assert records[4].sent_s == 9.0


def test_the_horizon_stops_the_clock():
    workload = shared_workload(200, 50)
    simulator = Simulator(SimSettings(num_groups=2, page_size=8, horizon_s=1.5), LinearCost())
    result = simulator.run(workload)
    simulator.validate()
    assert result.end_s == 1.5
    assert not result.stopped
    statuses = [record.status for record in result.requests]
    assert 0 < statuses.count("finished") < 200
    assert statuses.count("finished") + statuses.count("unfinished") == 200
    assert all(record.finished_s <= 1.5 for record in result.requests if record.status == "finished")
    made = sum(record.made_tokens for record in result.requests)
    assert sum(output for _, _, _, output in result.served) == made


class Rule:
    """Stops at the n-th call of one kind; remembers all."""

    def __init__(self, kind, at):
        self.kind, self.at, self.calls = kind, at, []

    def _note(self, kind, record, now):
        self.calls.append((kind, None if record is None else record.index, now))
        return kind == self.kind and sum(call[0] == kind for call in self.calls) == self.at

    def sent(self, record, now):
        return self._note("sent", record, now)

    def first_token(self, record, now):
        return self._note("first_token", record, now)

    def ended(self, record, now):
        return self._note("ended", record, now)

    def passed(self, now):
        return self._note("passed", None, now)


@pytest.mark.parametrize("kind", ["sent", "first_token", "ended", "passed"])
def test_a_rule_stops_the_run(kind):
    rule = Rule(kind, 7)
    result = Simulator(SimSettings(num_groups=2, page_size=8), LinearCost()).run(shared_workload(200, 50), stop=rule)
    assert result.stopped
    assert result.end_s == rule.calls[-1][2]
    assert "unfinished" in {record.status for record in result.requests}


def test_a_rule_hears_of_every_request():
    rule = Rule("never", 0)
    result = Simulator(SimSettings(num_groups=2, page_size=8), LinearCost()).run(shared_workload(50, 50), stop=rule)
    assert not result.stopped
    for kind in ("sent", "first_token", "ended"):
        assert sorted(index for name, index, _ in rule.calls if name == kind) == list(range(50))


def test_the_scheduler_is_told_how_long_requests_waited(monkeypatch):
    """From when the group's loop saw them, as a worker says it, not from when they came."""
    told = {}

    def note(self, request_id, now, queue_s=None):
        told[int(request_id)] = queue_s

    monkeypatch.setattr(GlobalScheduler, "first_token", note)
    cost = LinearCost(max_num_seqs=2)
    simulator = Simulator(SimSettings(num_groups=1, page_size=8), cost)
    result = simulator.run(shared_workload(20, 50))
    assert sorted(told) == list(range(20))
    step_s = cost.step_s(StepWork(8, 2000, [(64, 64)], 0))
    for record in result.requests:
        assert told[record.index] <= record.queue_s <= told[record.index] + step_s
    assert max(told.values()) > 10 * step_s


def test_network_time_is_waited():
    near, far = (simulate(shared_workload(1, 1), network_s=network_s).requests[0] for network_s in (0.0, 0.25))
    assert far.first_token_s == pytest.approx(near.first_token_s + 0.25)
    assert far.queue_s == near.queue_s == 0.0


@pytest.mark.parametrize(
    "broken",
    [
        {"num_prompt": 0},
        {"num_output": 0},
        {"arrival_s": -1.0},
        {"arrival_s": float("nan")},
        {"follows": 1},
        {"follows": 0, "think_s": -1.0},
        {"blocks": (1, 2, 3)},
    ],
)
def test_workloads_that_cannot_be_sent_are_refused(broken):
    fine = {"arrival_s": 1.0, "num_prompt": 16, "num_output": 1}
    requests = [SimRequest(**{**fine, "arrival_s": 0.5}), SimRequest(**{**fine, **broken})]
    with pytest.raises(InvalidRequestError, match="request 1"):
        simulate(Workload(name="w", block_size=8, requests=requests))


@pytest.mark.parametrize(
    "broken",
    [
        {"num_groups": 0},
        {"event_lag_s": -1.0},
        {"report_interval_s": 0.0},
        {"horizon_s": float("inf")},
        {"faults": (Fault(at_s=1.0, group=4, kind="kill"),)},
        {"faults": (Fault(at_s=-1.0, group=0, kind="kill"),)},
        {"kv_tokens": 31},
    ],
)
def test_settings_that_cannot_be_are_refused(broken):
    with pytest.raises(ConfigError):
        Simulator(SimSettings(**broken), LinearCost())
