"""Plans made while earlier ones still run: the same tokens, and pages that hold what they should.

The device here carries a plan out as late as it can, right before it is settled, with the pages and tokens that the
plan had when it was made. Steps run in order, as on a real device, and nothing else holds between host and device.
"""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preble_jax.config import QueueSettings, TenantSettings
from preble_jax.errors import InvariantError
from preble_jax.kv.hashing import block_hashes
from preble_jax.kv.prefix_cache import PrefixCache
from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams
from preble_jax.sched.limits import StepLimits
from preble_jax.sched.local_scheduler import LocalScheduler
from preble_jax.sched.queues import make_queue
from preble_jax.sched.sequence import PlannedRow

VOCAB, PAGE, MAX_LEN = 5, 4, 48


def next_token(tokens):
    return zlib.crc32(bytes(tokens)) % VOCAB


def expected_output(prompt, max_tokens, stop_ids):
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + max_tokens, MAX_LEN):
        tokens.append(next_token(tokens))
        if tokens[-1] in stop_ids:
            return tokens[len(prompt) :], "stop"
    return tokens[len(prompt) :], "length"


def make_scheduler(num_pages=64, policy="fair", prefix_cache=True, **limits):
    sizes = {
        "vocab_size": VOCAB,
        "max_model_len": MAX_LEN,
        "prefill_tokens": 16,
        "max_prefill_seqs": 3,
        "max_num_seqs": 4,
        "max_waiting": 99,
    }
    queue = make_queue(QueueSettings(policy=policy, dlpm_quantum=16.0), TenantSettings())
    return LocalScheduler(StepLimits(**{**sizes, **limits}), PrefixCache(num_pages, PAGE, enabled=prefix_cache), queue)


def make_request(name, prompt, max_tokens=4, stop_ids=()):
    return Request(
        request_id=name,
        prompt_token_ids=list(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, logprobs=True),
        stop_token_ids=frozenset(stop_ids),
    )


@dataclass
class Job:
    """A row as the device knows it. known: its tokens, None for one that starts from its slot's last token."""

    row: PlannedRow
    pages: tuple[int, ...]
    slot: int
    known: list[int] | None
    stop_ids: frozenset[int]

    @property
    def written(self):
        return {self.pages[i // PAGE] for i in range(self.row.start, self.row.start + self.row.num_tokens)}


class LateDevice:
    """sees_stops: whether it looks for stop ids itself, as the decode program does for a few of them."""

    def __init__(self, scheduler, sees_stops=True):
        self.scheduler = scheduler
        self.sees_stops = sees_stops
        self.in_flight = deque()
        self.written: dict[tuple[int, int], int] = {}
        self.last: dict[int, int] = {}
        self.outputs: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}
        self.num_steps = []

    def add(self, request):
        self.scheduler.add(request, 0.0)

    def plan(self, max_steps=1):
        plan = self.scheduler.schedule(0.0, max_steps)
        if plan is None:
            return False
        live = [row.sequence for row in plan.decode]
        assert len(live) <= self.scheduler.limits.max_num_seqs
        assert plan.num_steps == 1 or not plan.prefill
        cached = {page for node in self.scheduler.cache.tree for page in node.pages}
        jobs = []
        for row in plan.rows:
            sequence = row.sequence
            known = None if sequence.num_pending else list(sequence.tokens)
            jobs.append(Job(row, tuple(sequence.pages.pages), sequence.slot, known, sequence.request.stop_token_ids))
            assert not jobs[-1].written & cached, "a cached page would be written"
        assert len({job.slot for job in jobs}) == len(jobs)
        self.scheduler.started(plan)
        self.scheduler.validate()
        self.in_flight.append((plan, jobs))
        self.num_steps.append(plan.num_steps)
        return True

    def settle(self):
        plan, jobs = self.in_flight.popleft()
        made = [self._run(job) for job in jobs]
        outputs = self.scheduler.settle(plan, made, [[-0.5] * len(tokens) for tokens in made])
        self.scheduler.validate()
        for output in outputs:
            assert output.request_id not in self.reasons, "an output after the end"
            assert len(output.logprobs) == len(output.token_ids)
            self.outputs.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finished:
                self.reasons[output.request_id] = output.finish_reason
        self.check_cached_pages()

    def check_cached_pages(self):
        """Those that steps in flight fill, or whose last owner's steps are in flight, are to be looked at later."""
        busy = {page for _, jobs in self.in_flight for job in jobs for page in job.written}
        for node in self.scheduler.cache.tree:
            path = self.scheduler.cache.tree.path(node)
            num_written = next((place for place, page in enumerate(path) if page in busy), len(path))
            tokens = [self.written[page, i] for page in path[:num_written] for i in range(PAGE)]
            found = block_hashes(tokens, PAGE)[node.start :]
            assert found == node.hashes[: len(found)], "a cached page holds other tokens than its hash's"

    def run(self, depth=1, max_steps=1):
        for _ in range(3000):
            planned = self.plan(max_steps)
            if not planned and not self.in_flight:
                return
            while len(self.in_flight) > (depth if planned else 0):
                self.settle()
        raise AssertionError("the scheduler does not come to an end")

    def _run(self, job):
        row = job.row
        if row.num_made > 1 or job.known is None or row.start == len(job.known) - 1:
            return self._decode(job)
        for position in range(row.start, row.start + row.num_tokens):
            self._write(job, position, job.known[position])
        seen = self._read(job, row.start + row.num_tokens)
        assert seen == job.known[: len(seen)], "a page does not hold what its sequence believes"
        made = [next_token(seen)] if row.num_made else []
        self.last[job.slot] = next_token(seen)
        return made

    def _decode(self, job):
        token = self.last[job.slot] if job.known is None else job.known[-1]
        made = []
        if job.known is None and self.sees_stops and token in job.stop_ids:
            return made
        for position in range(job.row.start, job.row.start + job.row.num_made):
            self._write(job, position, token)
            token = next_token(self._read(job, position + 1))
            made.append(token)
            if self.sees_stops and token in job.stop_ids:
                break
        self.last[job.slot] = token
        return made

    def _write(self, job, position, token):
        self.written[job.pages[position // PAGE], position % PAGE] = token

    def _read(self, job, end):
        return [self.written[job.pages[i // PAGE], i % PAGE] for i in range(end)]


prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30).map(tuple)
shared = st.builds(
    lambda head, n, tail: head * n + tail, st.sampled_from([(1, 2, 3, 4), (0,)]), st.integers(0, 6), prompts
)
jobs = st.lists(
    st.tuples(shared.map(lambda p: p[:40]), st.integers(1, 14), st.sets(st.integers(0, VOCAB - 1), max_size=2)),
    min_size=1,
    max_size=12,
)
policies = st.sampled_from(["dlpm", "fair", "fcfs", "lpm", "priority_groups", "vtc"])


@settings(max_examples=200, deadline=None)
@given(jobs, st.integers(12, 40), policies, st.booleans(), st.integers(1, 9), st.booleans(), st.data())
def test_the_same_tokens_however_far_the_device_is_behind(
    jobs, num_pages, policy, prefix_cache, max_steps, sees_stops, data
):
    """Up to two plans in flight, several decode steps in a plan, evictions, preemptions, cancellations on the way."""
    scheduler = make_scheduler(num_pages, policy, prefix_cache, prefill_tokens=data.draw(st.sampled_from([1, 5, 16])))
    device = LateDevice(scheduler, sees_stops)
    depth = data.draw(st.integers(0, 2))
    cancelled = set()
    for i, (prompt, max_tokens, stop_ids) in enumerate(jobs):
        device.add(make_request(str(i), prompt, max_tokens, stop_ids))
        for _ in range(data.draw(st.integers(0, 3))):
            planned = device.plan(max_steps)
            while len(device.in_flight) > (depth if planned else 0):
                device.settle()
        name = data.draw(st.sampled_from([None, None, str(i), "0"]))
        if name is not None and scheduler.cancel(name) is not None:
            cancelled.add(name)
            scheduler.validate()
        if data.draw(st.booleans()):
            scheduler.cache.clear()
    device.run(depth, max_steps)
    for i, (prompt, max_tokens, stop_ids) in enumerate(jobs):
        tokens, reason = expected_output(prompt, max_tokens, stop_ids)
        got = device.outputs.get(str(i), [])
        if str(i) in cancelled:
            assert got == tokens[: len(got)]
        else:
            assert (got, device.reasons[str(i)]) == (tokens, reason)
    assert scheduler.num_unfinished == 0
    assert scheduler.cache.num_available == num_pages


def test_the_next_plan_uses_pages_that_the_one_in_flight_fills():
    scheduler = make_scheduler(max_num_seqs=8, max_prefill_seqs=8)
    device = LateDevice(scheduler)
    head = [1, 2, 3, 4] * 4
    for i in range(3):
        device.add(make_request(str(i), [*head, i, 2], 1))
    device.plan()  # the first computes the head and no more fits
    device.plan()
    (_, jobs) = device.in_flight[1]
    assert [job.row.start for job in jobs] == [16, 16, 16]
    device.run()
    assert scheduler.num_cached_tokens == 2 * len(head)


def test_a_length_stop_is_known_ahead():
    """Nothing is planned for it in vain, and its place in the batch is free for the next plan."""
    scheduler = make_scheduler(max_num_seqs=1)
    device = LateDevice(scheduler)
    device.add(make_request("a", [1, 2], 2))
    device.add(make_request("b", [3, 4], 1))
    names = []
    while device.plan():
        names.append([job.row.sequence.request.request_id for job in device.in_flight[-1][1]])
        if len(device.in_flight) > 1:
            device.settle()
    assert names == [["a"], ["a"], ["b"]]


def test_a_stop_found_late_costs_a_row_and_nothing_else():
    prompt = [1, 2, 3]
    stop = next_token(prompt)
    scheduler = make_scheduler()
    device = LateDevice(scheduler, sees_stops=False)
    device.add(make_request("a", prompt, 9, {stop}))
    device.plan()
    device.plan()
    device.settle()
    assert device.reasons == {"a": "stop"}
    assert scheduler.cache.num_available == 64, "its pages are free although a step in flight writes to one of them"
    device.add(make_request("b", [4] * 20, 3))
    device.run()
    assert device.outputs == {"a": [stop], "b": expected_output([4] * 20, 3, ())[0]}


def test_several_steps_only_while_nobody_waits():
    scheduler = make_scheduler(max_num_seqs=1)
    device = LateDevice(scheduler)
    device.add(make_request("a", [1] * 5, 30))
    device.plan(8)
    for _ in range(2):
        device.plan(8)
        device.settle()
    device.add(make_request("b", [2] * 5, 20))
    for _ in range(3):
        device.plan(8)
        device.settle()
    assert device.num_steps == [1, 8, 8, 1, 1, 1]
    scheduler.cancel("b")
    device.run(max_steps=8)
    assert device.num_steps[6:] == [8, 2]
    assert device.outputs["a"] == expected_output([1] * 5, 30, ())[0]


def test_nobody_is_preempted_for_a_look_ahead():
    scheduler = make_scheduler(num_pages=12, prefix_cache=False)
    device = LateDevice(scheduler)
    for name in "ab":
        device.add(make_request(name, [1] * 19, 4))
    device.run(max_steps=8)
    assert scheduler.num_preemptions == 0
    assert max(device.num_steps) > 1


def test_a_preemption_waits_until_nothing_is_in_flight():
    scheduler = make_scheduler(num_pages=12)
    device = LateDevice(scheduler)
    for name, token in (("old", 1), ("new", 2)):
        device.add(make_request(name, [token] * 20, 20))
    while not scheduler.num_preemptions:
        planned = device.plan()
        assert not scheduler.num_preemptions or len(device.in_flight) == planned
        while len(device.in_flight) > planned:
            device.settle()
    device.run()
    for name, token in (("old", 1), ("new", 2)):
        assert device.outputs[name] == expected_output([token] * 20, 20, ())[0]


def test_a_device_that_makes_too_few_tokens_is_noticed():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1, 2, 3], 5), 0.0)
    plan = scheduler.schedule(0.0)
    scheduler.started(plan)
    with pytest.raises(InvariantError, match="0 tokens made, 1 planned"):
        scheduler.settle(plan, [[]], [[]])
