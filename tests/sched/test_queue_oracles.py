"""Each queue policy against the literal transcription of its paper: same admissions, in the same order, all along."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from oracles.paper_queues import Job, NaiveFair, PaperDLPM, PaperFCFS, PaperLPM, PaperPriorityGroups, PaperVTC, Tenants
from preble_jax.config import QueueSettings, TenantSettings
from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams
from preble_jax.sched.queues import make_queue
from preble_jax.sched.sequence import Sequence

NAMES = ["a", "b", "c", "d"]
GROUPS = 4


def oracle(policy, tenants, quantum, head_start):
    prices = Tenants(tenants.weight, tenants.extend_weight, tenants.output_weight)
    return {
        "fcfs": PaperFCFS,
        "lpm": PaperLPM,
        "priority_groups": lambda: PaperPriorityGroups(GROUPS),
        "vtc": lambda: PaperVTC(prices),
        "dlpm": lambda: PaperDLPM(prices, quantum),
        "fair": lambda: NaiveFair(prices, quantum, head_start),
    }[policy]()


class QueueMachine(RuleBasedStateMachine):
    """Requests arrive, run, are preempted, are cancelled half computed, and their prefixes come and go.

    Weights and quanta are powers of two, so that repeated addition and closed form are equal to the last bit.
    """

    @initialize(
        policy=st.sampled_from(["dlpm", "fair", "fcfs", "lpm", "priority_groups", "vtc"]),
        weights=st.tuples(*[st.sampled_from([0.5, 1.0, 2.0]) for _ in NAMES]),
        quantum=st.sampled_from([1.0, 8.0, 64.0]),
        head_start=st.sampled_from([0.0, 0.25, 1.0, 4.0, 1e9]),
    )
    def start(self, policy, weights, quantum, head_start):
        tenants = TenantSettings(weights=tuple(zip(NAMES, weights, strict=True)))
        queue = QueueSettings(policy=policy, num_priority_groups=GROUPS, dlpm_quantum=quantum, head_start=head_start)
        self.queue = make_queue(queue, tenants)
        self.oracle = oracle(policy, tenants, quantum, head_start)
        self.jobs: list[Job] = []
        self.sequences: list[Sequence] = []
        self.waiting: set[int] = set()
        self.running: set[int] = set()

    @rule(tenant=st.sampled_from(NAMES), num_tokens=st.integers(1, 40), share=st.floats(0, 1), count=st.integers(1, 3))
    def arrive(self, tenant, num_tokens, share, count):
        for _ in range(count):
            order = len(self.jobs)
            cached = int(share * (num_tokens - 1))
            request = Request(
                request_id=str(order), prompt_token_ids=[0] * num_tokens, sampling=SamplingParams(), tenant=tenant
            )
            self.jobs.append(Job(order, tenant, num_tokens, cached, num_tokens - cached))
            self.sequences.append(Sequence(request, order, 4, 0.0, 0))
            self.wait(order)

    def wait(self, order):
        self.waiting.add(order)
        self.queue.add(self.sequences[order])
        self.oracle.arrive(self.jobs[order])

    @rule(data=st.data(), slots=st.integers(1, 5))
    def step(self, data, slots):
        waiting = sorted(self.waiting)
        awaiting = data.draw(st.sets(st.sampled_from(waiting)) if waiting else st.just(set()))
        admitted = []
        for sequence in self.queue.candidates(lambda s: self.jobs[s.order].cached):
            assert sequence.order in self.waiting
            if sequence.order in awaiting:
                continue
            self.queue.admitted(sequence)
            self.queue.remove(sequence)
            self.queue.served(sequence, self.jobs[sequence.order].extend, 0)
            self.waiting.remove(sequence.order)
            admitted.append(sequence.order)
            if len(admitted) == slots:
                break
        assert admitted == self.oracle.step(slots, awaiting)
        self.running |= set(admitted)
        for order in sorted(self.running):
            self.queue.served(self.sequences[order], 0, 1)
            self.oracle.output(self.jobs[order])

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data):
        order = data.draw(st.sampled_from(sorted(self.running)))
        self.running.remove(order)
        self.queue.finished(self.sequences[order])
        self.oracle.end(self.jobs[order])

    @precondition(lambda self: self.running)
    @rule(data=st.data(), share=st.floats(0, 1))
    def cancel_running(self, data, share):
        order = data.draw(st.sampled_from(sorted(self.running)))
        tokens = int(share * self.jobs[order].extend)
        self.queue.served(self.sequences[order], -tokens, 0)
        self.oracle.give_back(self.jobs[order], tokens)
        self.running.remove(order)
        self.queue.finished(self.sequences[order])
        self.oracle.end(self.jobs[order])

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel_waiting(self, data):
        order = data.draw(st.sampled_from(sorted(self.waiting)))
        self.waiting.remove(order)
        self.queue.remove(self.sequences[order])
        self.queue.finished(self.sequences[order])
        self.oracle.end(self.jobs[order])

    @precondition(lambda self: self.running)
    @rule()
    def preempt(self):
        running = [self.sequences[order] for order in sorted(self.running)]
        order = self.queue.victim(running).order
        self.running.remove(order)
        self.jobs[order].extend = 0
        self.jobs[order].num_tokens += 1  # what it made
        self.sequences[order].tokens.append(0)
        self.wait(order)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), share=st.floats(0, 1))
    def pages_come_and_go(self, data, share):
        job = self.jobs[data.draw(st.sampled_from(sorted(self.waiting)))]
        job.cached = int(share * (job.num_tokens - 1))
        if job.extend:
            job.extend = job.num_tokens - job.cached
        self.queue.rematched(self.sequences[job.order])

    @invariant()
    def nobody_is_lost(self):
        if hasattr(self, "queue"):
            assert {sequence.order for sequence in self.queue} == self.waiting
            assert len(self.queue) == len(self.waiting)


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
