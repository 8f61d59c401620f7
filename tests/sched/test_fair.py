"""The order of the fair queue: virtual arrivals, and what they promise. What it promises tenants: test_fairness.py."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preble_jax.config import TenantSettings
from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams
from preble_jax.sched.queues.fair import Fair
from preble_jax.sched.sequence import Sequence


class Line:
    """A fair queue whose requests have so many tokens, of which so many are cached."""

    def __init__(self, head_start, *, quantum=8.0):
        self.queue = Fair(TenantSettings(), quantum, head_start)
        self.sequences: list[Sequence] = []
        self.cached: list[int] = []
        self.running: list[Sequence] = []

    def arrive(self, num_tokens, cached=0, tenant="default"):
        order = len(self.sequences)
        request = Request(
            request_id=str(order), prompt_token_ids=[0] * num_tokens, sampling=SamplingParams(), tenant=tenant
        )
        self.sequences.append(Sequence(request, order, 4, 0.0, 0))
        self.cached.append(cached)
        self.queue.add(self.sequences[-1])
        return order

    def step(self, slots=1, awaiting=()):
        """Orders of those admitted. One that was admitted before is charged nothing."""
        taken = []
        for sequence in self.queue.candidates(lambda s: self.cached[s.order]):
            if sequence.order in awaiting:
                continue
            self.take(sequence)
            taken.append(sequence.order)
            if len(taken) == slots:
                break
        return taken

    def take(self, sequence):
        self.queue.admitted(sequence)
        self.queue.remove(sequence)
        if sequence.num_cached is None:
            sequence.num_cached = self.cached[sequence.order]
            self.queue.served(sequence, len(sequence.tokens) - sequence.num_cached, 0)
        self.running.append(sequence)

    def preempt(self, sequence):
        self.running.remove(sequence)
        self.queue.add(sequence)


@pytest.mark.parametrize(
    ("head_start", "expected"),
    [(0.0, [0, 1, 3, 4, 5]), (0.5, [1, 0, 4, 5, 3]), (1.0, [1, 4, 0, 5, 3]), (1e9, [4, 1, 5, 0, 3])],
)
def test_the_head_start_leads_from_arrival_order_to_shortest_uncached_first(head_start, expected):
    line = Line(head_start)
    line.arrive(100, cached=20)  # 0: 80 uncached, at V = 0
    line.arrive(100, cached=90)  # 1: 10
    line.take(line.sequences[line.arrive(50)])  # 2
    line.arrive(100, cached=10)  # 3: 90, at V = 50
    line.arrive(40, cached=36)  # 4: 4
    line.arrive(75)  # 5: 75
    assert line.step(5) == expected


def test_a_request_lets_pass_what_comes_before_its_head_start_is_over():
    line = Line(1.0)
    cold = line.arrive(100)
    for _ in range(3):
        hit = line.arrive(31, cached=1)
        assert line.step() == [hit]
    line.arrive(31, cached=1)  # at V = 90: 120
    before = line.arrive(31, cached=22)  # 99
    assert line.step() == [before]  # V = 99
    line.arrive(31, cached=30)  # 100, as the cold one, which came first
    assert line.step() == [cold]


def test_an_endless_stream_of_hits_passes_for_as_long_as_the_head_start():
    """Every prompt's last token is computed, so that hits move the virtual time by one each."""
    line = Line(2.0)
    cold = line.arrive(50)
    admitted = []
    while cold not in admitted:
        line.arrive(17, cached=16)
        admitted += line.step()
        assert len(admitted) <= 2 * 50 + 1
    assert len(admitted) > 2 * 50 - 3


def test_what_is_given_back_does_not_turn_the_virtual_time_back():
    line = Line(1.0)
    given_back = line.arrive(80)
    assert line.step() == [given_back]
    first = line.arrive(10)
    line.queue.served(line.sequences[given_back], -80, 0)
    line.queue.finished(line.sequences[given_back])
    line.arrive(10)
    assert line.step() == [first]


def test_the_preempted_keep_their_arrival_and_move_nothing_when_they_come_back():
    line = Line(1.0)
    early = line.arrive(30)
    assert line.step() == [early]
    late = [line.arrive(20) for _ in range(2)]
    assert line.step() == late[:1]
    line.sequences[early].tokens.extend([0] * 25)  # made meanwhile: 55 uncached tokens since V = 0
    line.preempt(line.sequences[early])
    assert line.step() == late[1:], "30 + 20 against 0 + 55"
    line.arrive(1)  # at V = 70
    assert line.step() == [early]
    line.preempt(line.sequences[late[1]])  # 30 + 20
    line.cached[late[0]] = 19
    line.preempt(line.sequences[late[0]])  # 30 + 1
    assert line.step(3) == [*late, 3], "V = 70 still, so that 71 is last"
    after = line.arrive(1)  # at V = 71
    before = line.arrive(1, cached=0)
    assert line.step(2) == [after, before]


def test_only_unfinished_requests_are_remembered():
    line = Line(1.0)
    for i in range(100):
        sequence = line.sequences[line.arrive(5, tenant=f"tenant-{i % 7}")]
        if i % 3:
            line.step()
        else:  # cancelled while it waits
            line.queue.remove(sequence)
            line.queue.finished(sequence)
        while line.running:
            line.queue.finished(line.running.pop())
    while line.step():
        line.queue.finished(line.running.pop())
    assert not line.queue._arrived
    assert not line.queue._unsure


arrivals = st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1), st.sampled_from("abc")), max_size=4)
steps = st.tuples(arrivals, st.integers(1, 3), st.sets(st.integers(0, 30)), st.integers(0, 30), st.booleans())


@settings(max_examples=200, deadline=None)
@given(st.lists(steps, min_size=3, max_size=30), st.sampled_from([0.0, 0.5, 1.0, 3.0]), st.sampled_from([1.0, 64.0]))
def test_nobody_that_comes_after_the_head_start_is_admitted_before(steps, head_start, quantum):
    """Whatever arrives, is cached, is evicted, waits for pages, is preempted: among those whose tenant has something
    left to spend, and exactly by what is uncached at the time."""
    line = Line(head_start, quantum=quantum)
    virtual_time, arrived = 0, {}
    for coming, slots, awaiting, changed, preempt in steps:
        for num_tokens, share, tenant in coming:
            arrived[line.arrive(num_tokens, int(share * (num_tokens - 1)), tenant)] = virtual_time
        if changed < len(line.sequences):
            line.cached[changed] = (line.cached[changed] * 7 + 3) % len(line.sequences[changed].tokens)
            line.queue.rematched(line.sequences[changed])
        if preempt and line.running:
            line.preempt(line.queue.victim(sorted(line.running, key=lambda s: s.order)))
        taken = 0
        for sequence in line.queue.candidates(lambda s: line.cached[s.order]):
            if sequence.order in awaiting:
                continue
            deficits = line.queue.deficits()
            assert deficits[sequence.request.tenant] > 0
            for other in line.queue:
                if other.order in awaiting or deficits[other.request.tenant] <= 0:
                    continue
                uncached = len(other.tokens) - line.cached[other.order]
                lead = arrived[sequence.order] - arrived[other.order]
                assert sequence.order <= other.order or lead < head_start * uncached
            if sequence.num_cached is None:
                virtual_time += len(sequence.tokens) - line.cached[sequence.order]
            line.take(sequence)
            taken += 1
            if taken == slots:
                break


@settings(max_examples=50, deadline=None)
@given(arrivals.filter(len), st.sampled_from([0.0, 1.0, 3.0]), st.integers(1, 40))
def test_it_waits_no_longer_than_had_it_come_a_head_start_later_to_first_come_first_served(stream, head_start, length):
    """One tenant, hits and others without end, one admission a step: r goes when all are gone that came before the
    queue had taken on head_start * length tokens, if not earlier."""
    line = Line(head_start)
    r = line.arrive(length)
    charged, ahead, admitted = 0, Counter(), []
    while r not in admitted:
        for num_tokens, share, _ in stream:
            order = line.arrive(num_tokens, int(share * (num_tokens - 1)))
            ahead[charged < head_start * length] += 1
        (order,) = line.step()
        admitted.append(order)
        charged += len(line.sequences[order].tokens) - line.cached[order]
        assert len(admitted) <= ahead[True] + 1
