from __future__ import annotations

from collections import Counter
from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preble_jax.config import QueueSettings, TenantSettings
from preble_jax.errors import ConfigError
from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams
from preble_jax.sched.queues import make_queue
from preble_jax.sched.queues.fcfs import FCFS
from preble_jax.sched.queues.priority_groups import PriorityGroups
from preble_jax.sched.queues.vtc import VTC
from preble_jax.sched.sequence import Sequence

POLICIES = ["dlpm", "fair", "fcfs", "lpm", "priority_groups", "vtc"]


def waiting(order, num_tokens=100, tenant="default"):
    request = Request(
        request_id=str(order), prompt_token_ids=[0] * num_tokens, tenant=tenant, sampling=SamplingParams()
    )
    return Sequence(request, order, 16, 0.0, 0)


def fill(queue, cached):
    """One waiting sequence of 100 tokens for each entry of `cached`, in order of arrival."""
    sequences = [waiting(order) for order in range(len(cached))]
    for sequence in sequences:
        queue.add(sequence)
    return sequences


def admit(queue, cached, count):
    """Admits `count` sequences, as the scheduler does, and returns their orders."""
    taken = []
    for sequence in queue.candidates(lambda s: cached[s.order]):
        queue.admitted(sequence)
        queue.remove(sequence)
        taken.append(sequence.order)
        if len(taken) == count:
            break
    return taken


def test_63_of_100_cached_tokens_are_group_6_of_10():
    queue = PriorityGroups(10)
    assert [queue.group(c, 100) for c in (0, 9, 10, 63, 99, 100)] == [0, 0, 1, 6, 9, 9]


def test_55_slots_over_ten_full_groups_go_10_to_the_top_9_to_the_next():
    queue = PriorityGroups(10)
    cached = [10 * (i % 10) for i in range(400)]
    fill(queue, cached)
    taken = admit(queue, cached, 55)
    assert Counter(cached[order] // 10 for order in taken) == {group: group + 1 for group in range(10)}
    for group in range(10):
        mine = [order for order in taken if cached[order] == 10 * group]
        assert mine == sorted(mine), "first come, first served within a group"


def test_the_proportion_holds_when_slots_come_one_at_a_time():
    queue = PriorityGroups(10)
    cached = [10 * (i % 10) for i in range(400)]
    fill(queue, cached)
    taken = [admit(queue, cached, 1)[0] for _ in range(55)]
    assert Counter(cached[order] // 10 for order in taken) == {group: group + 1 for group in range(10)}


def test_no_group_starves_behind_a_stream_of_cached_requests():
    queue = PriorityGroups(10)
    cold = waiting(0)
    queue.add(cold)
    for order in range(1, 12):
        queue.add(waiting(order))
    for step in range(30):
        (taken,) = admit(queue, {i: 0 if i == 0 else 95 for i in range(100)}, 1)
        if taken == 0:
            break
        queue.add(waiting(12 + step))
    assert taken == 0


def test_a_group_that_was_empty_has_saved_up_nothing():
    queue = PriorityGroups(2)
    cached = dict.fromkeys(range(100), 99)
    for order in range(40):
        queue.add(waiting(order))
    admit(queue, cached, 30)
    for order in range(40, 60):
        queue.add(waiting(order))
        cached[order] = 0
    taken = admit(queue, cached, 9)
    assert Counter(cached[order] for order in taken)[99] >= 5


def test_a_candidate_that_is_passed_over_costs_its_group_nothing():
    queue = PriorityGroups(10)
    cached = {0: 95, 1: 95, 2: 0}
    fill(queue, cached)
    proposed = [s.order for s in queue.candidates(lambda s: cached[s.order])]
    assert proposed == [0, 1, 2]
    assert admit(queue, cached, 1) == [0]


def test_groups_that_were_all_empty_start_together():
    """The top group was served a hundred times alone; that is no debt when both come back."""
    queue = PriorityGroups(2)
    cached = dict.fromkeys(range(100), 99)
    fill(queue, [99] * 100)
    admit(queue, cached, 100)
    assert admit(queue, cached, 1) == []
    for order in range(100, 118):
        queue.add(waiting(order))
        cached[order] = 99 if order % 2 else 0
    assert Counter(cached[order] for order in admit(queue, cached, 9)) == {99: 6, 0: 3}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(0, 5), st.integers(0, 9))
def test_no_request_starves_under_priority_groups(hot, ahead, mine):
    """However well cached the requests that keep coming: a group of rank r is served at least once in 55 / r + 9
    admissions, so that a request with n before it in its group is admitted within (n + 1) (55 / r + 9)."""
    queue = PriorityGroups(10)
    cached, arrivals = {}, cycle(hot)

    def arrive(group):
        sequence = waiting(len(cached))
        cached[sequence.order] = 10 * group
        queue.add(sequence)
        return sequence

    for _ in range(20):
        arrive(next(arrivals))
    admit(queue, cached, 7)
    for _ in range(ahead):
        arrive(mine)
    already = sum(queue.group(cached[s.order], 100) == mine for s in queue)
    last = arrive(mine)
    num_admitted, taken = 0, None
    while taken != last.order:
        arrive(next(arrivals))
        (taken,) = admit(queue, cached, 1)
        num_admitted += 1
        assert num_admitted <= (already + 1) * (55 / (mine + 1) + 9)


@given(st.permutations(range(8)))
def test_fcfs_goes_by_arrival_even_for_those_that_come_back(orders):
    queue = FCFS()
    sequences = {order: waiting(order) for order in orders}
    for order in orders:
        queue.add(sequences[order])
    assert [s.order for s in queue.candidates(lambda s: 0)] == list(range(8))
    queue.remove(sequences[3])
    assert [s.order for s in queue] == [0, 1, 2, 4, 5, 6, 7]


@pytest.mark.parametrize("policy", POLICIES)
def test_removing_what_does_not_wait_is_an_error(policy):
    queue = make_queue(QueueSettings(policy=policy))
    with pytest.raises(KeyError, match="'0' is not waiting"):
        queue.remove(waiting(0))


def test_unknown_policies_are_refused():
    with pytest.raises(ConfigError, match="expected fair, dlpm, vtc, lpm, fcfs or priority_groups, got 'lifo'"):
        make_queue(QueueSettings(policy="lifo"))  # type: ignore[arg-type]


def test_a_tenant_that_comes_and_goes_leaves_nothing_behind_in_vtc():
    queue = VTC(TenantSettings())
    queue.add(waiting(0))
    ahead = waiting(1, tenant="ahead")
    queue.add(ahead)
    queue.served(ahead, 1000, 0)
    queue.remove(ahead)
    queue.finished(ahead)
    for order in range(2, 1000):
        sequence = waiting(order, tenant="ahead")
        queue.add(sequence)
        queue.remove(sequence)
        queue.finished(sequence)
    assert len(queue._idle) == 1
    assert set(queue.deficits()) == {"default", "ahead"}
