"""Remembered matches against asking the cache again, while pages come and go; and what a step may cost."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fakes.token_device import TokenDevice, request
from preble_jax.config import QueueSettings
from preble_jax.kv.prefix_cache import PrefixCache
from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams
from preble_jax.sched.limits import StepLimits
from preble_jax.sched.local_scheduler import LocalScheduler
from preble_jax.sched.prefix_matches import PrefixMatches
from preble_jax.sched.queues import make_queue
from preble_jax.sched.sequence import Sequence

prompts = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple)


class MatchMachine(RuleBasedStateMachine):
    """Pages of one token over two tokens, so that prefixes meet and part everywhere; twelve pages, so that they go."""

    def __init__(self):
        super().__init__()
        self.cache = PrefixCache(12, 1)
        self.matches = PrefixMatches(self.cache)
        self.waiting: dict[int, Sequence] = {}
        self.told: dict[int, int] = {}  # the match each sequence's queue was last told
        self.number = 0

    @rule(prompt=prompts)
    def wait(self, prompt):
        sequence = Sequence(
            Request(request_id=str(self.number), prompt_token_ids=prompt, sampling=SamplingParams()),
            self.number,
            1,
            0.0,
            0,
        )
        self.waiting[self.number] = sequence
        self.told[self.number] = self.matches.num_pages(sequence)
        self.number += 1

    @rule(prompt=prompts, last=st.booleans())
    def compute(self, prompt, last):
        """A request computes all its pages, commits and ends, evicting what must go."""
        sequence = Sequence(Request(request_id="", prompt_token_ids=prompt, sampling=SamplingParams()), -1, 1, 0.0, 0)
        held = self.cache.open(sequence.hashes())
        if self.cache.extend(held, len(prompt) - len(held.pages)):
            self.cache.commit(held, sequence.hashes())
        self.cache.release(held)

    @rule()
    def clear(self):
        self.cache.clear()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data):
        order = data.draw(st.sampled_from(sorted(self.waiting)))
        self.matches.forget(self.waiting.pop(order))
        del self.told[order]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def ask(self, data):
        order = data.draw(st.sampled_from(sorted(self.waiting)))
        self.told[order] = self.matches.num_pages(self.waiting[order])
        assert self.told[order] == self.cache.match(self.waiting[order].matchable_hashes())

    @rule(limit=st.integers(1, 3))
    def hear_of_a_few(self, limit):
        taken = self.matches.take_stale(limit)
        assert len(taken) <= limit
        for sequence in taken:
            self.told[sequence.order] = self.matches.num_pages(sequence)

    @rule()
    def hear_of_all(self):
        """Then the queue has been told the truth about everybody."""
        for sequence in self.matches.take_stale(1_000):
            assert sequence.order in self.waiting
            self.told[sequence.order] = self.matches.num_pages(sequence)
        truth = {order: self.cache.match(s.matchable_hashes()) for order, s in self.waiting.items()}
        assert self.told == truth

    @invariant()
    def adds_up(self):
        self.matches.validate()

    def teardown(self):
        self.hear_of_all()
        for sequence in self.waiting.values():
            self.matches.forget(sequence)
        assert not self.matches._watchers and not self.matches._matches


TestMatchMachine = MatchMachine.TestCase
TestMatchMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


class CountingMatches(PrefixMatches):
    """Counts sequences that are asked for, and those that are told to the queue as changed."""

    num_touched = 0

    def num_pages(self, sequence):
        self.num_touched += 1
        return super().num_pages(sequence)

    def take_stale(self, limit):
        taken = super().take_stale(limit)
        self.num_touched += len(taken)
        return taken


@pytest.mark.parametrize("policy", ["dlpm", "fair", "fcfs", "lpm", "priority_groups", "vtc"])
def test_a_step_looks_at_no_more_with_a_longer_queue(policy):
    """3,000 requests of one family: a page that all of them wait for is computed, stored, and theirs all at once."""
    limits = StepLimits(
        vocab_size=7, max_model_len=64, prefill_tokens=16, max_prefill_seqs=4, max_num_seqs=4, max_waiting=10_000
    )
    cache = PrefixCache(64, 4)
    scheduler = LocalScheduler(limits, cache, make_queue(QueueSettings(policy=policy)))
    scheduler._matches = matches = CountingMatches(cache)
    device = TokenDevice(scheduler, 7)
    for i in range(3_000):
        scheduler.add(request(str(i), [1] * 20 + [i % 7, i % 5], 1, f"tenant-{i % 3}"), 0.0)
    touched = []
    for _ in range(60):
        matches.num_touched = 0
        assert device.run_step()
        touched.append(matches.num_touched)
    assert max(touched) < 400
    assert len(device.ended) > 100


def test_requests_behind_many_that_wait_for_a_page_are_not_forgotten():
    """More requests than one step passes over wait for one page; behind them is one of another family."""
    limits = StepLimits(
        vocab_size=7, max_model_len=64, prefill_tokens=64, max_prefill_seqs=2, max_num_seqs=2, max_waiting=10_000
    )
    scheduler = LocalScheduler(limits, PrefixCache(200, 4), make_queue(QueueSettings(policy="fcfs")))
    device = TokenDevice(scheduler, 7)
    for i in range(100):
        scheduler.add(request(f"family-{i}", [1] * 20 + [i % 7], 1), 0.0)
    scheduler.add(request("other", [2] * 20, 1), 0.0)
    while device.run_step():
        scheduler.validate()
    assert Counter(name.partition("-")[0] for name in device.ended) == {"family": 100, "other": 1}
