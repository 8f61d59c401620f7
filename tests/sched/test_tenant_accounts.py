"""What the fair queues remember of a tenant, and for how long."""

from __future__ import annotations

import pytest

from preble_jax.config import QueueSettings
from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams
from preble_jax.sched.queues import make_queue
from preble_jax.sched.sequence import Sequence


@pytest.mark.parametrize("policy", ["dlpm", "fair", "vtc"])
def test_tenants_that_are_gone_do_not_pile_up(policy):
    queue = make_queue(QueueSettings(policy=policy))
    for order in range(2_000):
        request = Request(
            request_id=str(order), prompt_token_ids=[0] * 9, sampling=SamplingParams(), tenant=f"tenant-{order}"
        )
        sequence = Sequence(request, order, 4, 0.0, 0)
        queue.add(sequence)
        if order % 5 == 0:
            taken = []
            for candidate in queue.candidates(lambda s: 0):
                queue.remove(candidate)
                queue.served(candidate, 9, 5)
                taken.append(candidate)
            for candidate in taken:
                queue.finished(candidate)
    assert len(queue.deficits()) < 50


class Ledger:
    """A queue from which tenants get one request at a time, of so many extend tokens. Quantum 10."""

    def __init__(self, policy):
        self.queue = make_queue(QueueSettings(policy=policy, dlpm_quantum=10.0))
        self.number = 0

    def wait(self, tenant, extend):
        request = Request(
            request_id=str(self.number), prompt_token_ids=[0] * extend, sampling=SamplingParams(), tenant=tenant
        )
        sequence = Sequence(request, self.number, 4, 0.0, 0)
        self.number += 1
        self.queue.add(sequence)
        return sequence

    def admit(self, sequence):
        assert next(self.queue.candidates(lambda s: 0)) is sequence
        self.take(sequence)
        return sequence

    def take(self, sequence):
        self.queue.remove(sequence)
        self.queue.served(sequence, len(sequence.tokens), 0)

    def run(self, tenant, extend):
        self.queue.finished(self.admit(self.wait(tenant, extend)))


def test_dlpm_does_not_forget_a_debt_made_after_coming_back():
    ledger = Ledger("dlpm")
    ledger.run("debtor", 5)  # 10 - 5: to be forgotten at the next refill
    ledger.run("debtor", 1000)
    for _ in range(20):
        ledger.run("other", 10)
    assert -1000 < ledger.queue.deficits()["debtor"] < -700


def test_vtc_does_not_forget_a_counter_that_grew_after_coming_back():
    ledger = Ledger("vtc")
    others = [ledger.wait("other", 50) for _ in range(3)]  # waits all along, so that nobody is lifted above it
    for extend in (5, 1000):
        sequence = ledger.wait("debtor", extend)
        ledger.take(sequence)
        ledger.queue.finished(sequence)
    ledger.admit(others[0])
    ledger.wait("other", 1)
    assert ledger.queue.deficits() == {"other": 0, "debtor": 50 - 1005}


def test_dlpm_gives_back_no_more_than_a_quantum():
    ledger = Ledger("dlpm")
    sequence = ledger.admit(ledger.wait("a", 100))
    for _ in range(30):
        ledger.run("b", 10)
    assert ledger.queue.deficits()["a"] == 10
    ledger.queue.served(sequence, -90, 0)
    assert ledger.queue.deficits()["a"] == 10
