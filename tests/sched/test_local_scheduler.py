"""The local scheduler with a fake device: the next token is a function of the tokens so far, so outputs are known."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preble_jax.config import QueueSettings, TenantSettings
from preble_jax.errors import InvalidRequestError, OverloadedError, PromptTooLongError
from preble_jax.kv.hashing import block_hashes
from preble_jax.kv.prefix_cache import PrefixCache
from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams
from preble_jax.sched.limits import StepLimits
from preble_jax.sched.local_scheduler import LocalScheduler
from preble_jax.sched.queues import make_queue

VOCAB = 5
PAGE = 4


def next_token(tokens):
    return zlib.crc32(bytes(tokens)) % VOCAB


def expected_output(prompt, max_tokens, stop_ids, max_model_len):
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
        if tokens[-1] in stop_ids:
            return tokens[len(prompt) :], "stop"
        if len(tokens) == max_model_len:
            break
    return tokens[len(prompt) :], "length"


POLICIES = ["dlpm", "fair", "fcfs", "lpm", "priority_groups", "vtc"]


def make_scheduler(num_pages=64, policy="fair", prefix_cache=True, quantum=16.0, weights=(), **limits):
    sizes = {
        "vocab_size": VOCAB,
        "max_model_len": 48,
        "prefill_tokens": 16,
        "max_prefill_seqs": 3,
        "max_num_seqs": 4,
        "max_waiting": 99,
    }
    limits = StepLimits(**{**sizes, **limits})
    cache = PrefixCache(num_pages, PAGE, enabled=prefix_cache)
    queue = make_queue(QueueSettings(policy=policy, dlpm_quantum=quantum), TenantSettings(weights=weights))
    return LocalScheduler(limits, cache, queue)


def make_request(name, prompt, max_tokens=4, stop_ids=(), **more):
    return Request(
        request_id=name,
        prompt_token_ids=list(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0),
        stop_token_ids=frozenset(stop_ids),
        **more,
    )


class FakeDevice:
    """Runs plans and checks what every plan must obey. `written` knows which token each page slot holds."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.written: dict[tuple[int, int], int] = {}
        self.num_computed = 0
        self.outputs: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}
        self.cached: dict[str, int] = {}

    def step(self, now=0.0):
        scheduler, limits = self.scheduler, self.scheduler.limits
        plan = scheduler.schedule(now)
        if plan is None:
            return False
        assert len(plan.decode) <= limits.max_num_seqs
        assert len(plan.prefill) <= limits.max_prefill_seqs
        assert plan.num_prefill_tokens <= limits.prefill_tokens
        tokens = [[self._compute(row)] for row in plan.rows]
        scheduler.started(plan)
        self.note(scheduler.settle(plan, tokens, [[0.0]] * len(tokens)))
        scheduler.validate()
        return True

    def _compute(self, row):
        """Writes the row's tokens, then reads all it attends to back from the pages."""
        sequence = row.sequence
        for position in range(row.start, row.start + row.num_tokens):
            self.written[sequence.pages.pages[position // PAGE], position % PAGE] = sequence.tokens[position]
        self.num_computed += row.num_tokens
        end = row.start + row.num_tokens
        seen = [self.written[sequence.pages.pages[i // PAGE], i % PAGE] for i in range(end)]
        assert seen == sequence.tokens[:end], "a page does not hold what its sequence believes"
        return next_token(seen)

    def note(self, outputs):
        for output in outputs:
            assert output.request_id not in self.reasons, "an output after the end"
            self.outputs.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finished:
                self.reasons[output.request_id] = output.finish_reason
                self.cached[output.request_id] = output.cached_tokens

    def run(self, limit=2000):
        for _ in range(limit):
            if not self.step():
                return
        raise AssertionError("the scheduler does not come to an end")


prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30).map(tuple)
shared = st.builds(
    lambda head, n, tail: head * n + tail, st.sampled_from([(1, 2, 3, 4), (0,)]), st.integers(0, 6), prompts
)
jobs = st.lists(
    st.tuples(shared.map(lambda p: p[:40]), st.integers(1, 12), st.sets(st.integers(0, VOCAB - 1), max_size=1)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(
    jobs,
    st.integers(12, 40),
    st.sampled_from(POLICIES),
    st.booleans(),
    st.sampled_from([1, 5, 16, 64]),
    st.data(),
)
def test_every_request_ends_once_with_its_tokens(jobs, num_pages, policy, prefix_cache, prefill_tokens, data):
    """Whatever the pool, the chunk, the policy, the order of arrival: with evictions and preemptions on the way."""
    scheduler = make_scheduler(num_pages, policy, prefix_cache, prefill_tokens=prefill_tokens)
    device = FakeDevice(scheduler)
    for i, (prompt, max_tokens, stop_ids) in enumerate(jobs):
        tenant = data.draw(st.sampled_from(["one", "two", "three"]))
        scheduler.add(make_request(str(i), prompt, max_tokens, stop_ids, tenant=tenant), 0.0)
        for _ in range(data.draw(st.integers(0, 2))):
            device.step()
    device.run()
    for i, (prompt, max_tokens, stop_ids) in enumerate(jobs):
        assert (device.outputs[str(i)], device.reasons[str(i)]) == expected_output(prompt, max_tokens, stop_ids, 48)
    assert scheduler.num_unfinished == 0
    assert scheduler.cache.num_available == num_pages


@settings(max_examples=60, deadline=None)
@given(jobs, st.sampled_from(POLICIES), st.data())
def test_cancelling_frees_pages_at_once(jobs, policy, data):
    scheduler = make_scheduler(24, policy)
    device = FakeDevice(scheduler)
    for i, (prompt, max_tokens, stop_ids) in enumerate(jobs):
        scheduler.add(make_request(str(i), prompt, max_tokens, stop_ids), 0.0)
    cancelled = set()
    while scheduler.num_unfinished:
        device.step()
        name = data.draw(st.sampled_from([str(i) for i in range(len(jobs))]))
        output = scheduler.cancel(name)
        scheduler.validate()
        if name in device.reasons or name in cancelled:
            assert output is None
        else:
            assert output.finish_reason == "cancelled"
            cancelled.add(name)
    assert cancelled.isdisjoint(device.reasons)
    assert len(cancelled) + len(device.reasons) == len(jobs)
    assert scheduler.cache.num_available == 24


def test_a_repeated_prompt_costs_its_last_page_only():
    scheduler = make_scheduler()
    device = FakeDevice(scheduler)
    prompt = [1, 2, 3, 4] * 6
    scheduler.add(make_request("a", prompt, 1), 0.0)
    device.run()
    assert device.num_computed == len(prompt)
    scheduler.add(make_request("b", prompt, 1), 0.0)
    device.run()
    assert device.num_computed == len(prompt) + PAGE
    assert device.cached == {"a": 0, "b": len(prompt) - PAGE}
    assert (scheduler.num_prompt_tokens, scheduler.num_cached_tokens) == (2 * len(prompt), len(prompt) - PAGE)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("prefill_tokens", [8, 16, 64])
def test_requests_wait_for_a_prefix_that_is_being_computed(prefill_tokens, policy):
    """Eight requests of one family arrive together: the 24 shared tokens are computed once."""
    scheduler = make_scheduler(policy=policy, max_num_seqs=8, max_prefill_seqs=8, prefill_tokens=prefill_tokens)
    device = FakeDevice(scheduler)
    head = [1, 2, 3, 4] * 6
    for i in range(8):
        scheduler.add(make_request(str(i), [*head, i % VOCAB, i // VOCAB, 2], 1), 0.0)
    device.run()
    assert device.num_computed == len(head) + 8 * 3
    assert sum(device.cached.values()) == 7 * len(head)


@pytest.mark.parametrize(("policy", "second"), [("dlpm", "last"), ("fcfs", "0"), ("lpm", "last")])
def test_a_waiting_request_moves_up_when_its_prefix_is_stored_and_down_when_it_is_evicted(policy, second):
    scheduler = make_scheduler(policy=policy, max_num_seqs=1, quantum=1024.0)
    device = FakeDevice(scheduler)
    scheduler.add(make_request("first", [1, 2, 3, 4] * 4, 1), 0.0)
    for i in range(3):
        scheduler.add(make_request(str(i), [i] * 12, 1), 0.0)
    for name in ("last", "evicted"):
        scheduler.add(make_request(name, [1, 2, 3, 4] * 4 + [0], 1), 0.0)
    for _ in range(2):
        while not device.step() or len(scheduler.running):
            pass
    assert list(device.reasons) == ["first", second]
    scheduler.cache.clear()
    device.run()
    if policy != "fcfs":
        assert list(device.reasons)[2:] == ["0", "1", "2", "evicted"]


@pytest.mark.parametrize("first", [5, 4])
def test_a_prompt_that_is_all_of_anothers_first_page(first):
    """Its only full page is never taken from the cache, so it runs beside the one that computes the same page."""
    scheduler = make_scheduler(prefill_tokens=1)
    device = FakeDevice(scheduler)
    for name, length in (("a", first), ("b", 4), ("c", 5)):
        scheduler.add(make_request(name, [0] * length, 1), 0.0)
    device.run()
    assert len(device.reasons) == 3
    assert device.cached["c"] == PAGE


def test_a_request_with_another_salt_does_not_share():
    scheduler = make_scheduler()
    device = FakeDevice(scheduler)
    for name, salt in (("a", b""), ("b", b"tenant"), ("c", b"tenant")):
        scheduler.add(make_request(name, [1, 2, 3, 4] * 3, 1, cache_salt=salt), 0.0)
    device.run()
    assert device.cached == {"a": 0, "b": 0, "c": 8}


def test_whoever_computes_a_prefix_may_vanish():
    scheduler = make_scheduler(prefill_tokens=4, max_prefill_seqs=1)
    device = FakeDevice(scheduler)
    prompt = [1, 2, 3, 4] * 6
    scheduler.add(make_request("a", prompt, 2), 0.0)
    scheduler.add(make_request("b", prompt, 2), 0.0)
    device.step()
    scheduler.cancel("a")
    device.run()
    assert device.outputs["b"] == expected_output(prompt, 2, (), 48)[0]
    assert device.cached["b"] == PAGE


def test_the_latest_request_is_preempted_and_loses_nothing():
    scheduler = make_scheduler(num_pages=13, max_model_len=48)
    device = FakeDevice(scheduler)
    prompts = {"old": [1] * 20, "new": [2] * 20}
    for name, prompt in prompts.items():
        scheduler.add(make_request(name, prompt, 20), 0.0)
    ended = []
    while device.step():
        ended = list(device.reasons)
        if scheduler.num_preemptions:
            assert all(s.request.request_id == "old" for s in scheduler.running) or "old" in ended
    assert scheduler.num_preemptions >= 1
    assert ended[0] == "old"
    for name, prompt in prompts.items():
        assert device.outputs[name] == expected_output(prompt, 20, (), 48)[0]


def test_deadlines_end_waiting_and_running_requests():
    scheduler = make_scheduler(max_num_seqs=1)
    device = FakeDevice(scheduler)
    scheduler.add(make_request("runs", [1] * 20, 9, deadline_s=5.0), 0.0)
    scheduler.add(make_request("waits", [2] * 20, 9, deadline_s=5.0), 0.0)
    scheduler.add(make_request("patient", [3] * 20, 2), 0.0)
    device.step(0.0)
    assert scheduler.expire(4.9) == []
    assert {o.request_id: o.finish_reason for o in scheduler.expire(5.0)} == {"runs": "deadline", "waits": "deadline"}
    scheduler.validate()
    device.run()
    assert device.reasons == {"patient": "length"}


def test_what_can_never_run_is_refused_and_changes_nothing():
    scheduler = make_scheduler(max_waiting=1)
    for prompt, error, words in [
        ([], InvalidRequestError, "at least one token"),
        ([1] * 48, PromptTooLongError, "at most 47 tokens .* got 48"),
        ([1, VOCAB], InvalidRequestError, r"\[0, 4\], got 5"),
        ([-1], InvalidRequestError, "got -1"),
    ]:
        with pytest.raises(error, match=words):
            scheduler.add(make_request("bad", prompt), 0.0)
    scheduler.add(make_request("a", [1]), 0.0)
    with pytest.raises(InvalidRequestError, match="'a', which is still running"):
        scheduler.add(make_request("a", [1]), 0.0)
    with pytest.raises(OverloadedError, match="1 requests wait, at most 1") as overloaded:
        scheduler.add(make_request("b", [1]), 0.0)
    assert overloaded.value.retry_after_s > 0
    assert scheduler.num_unfinished == 1
    scheduler.validate()


def test_generated_pages_serve_the_next_turn():
    scheduler = make_scheduler()
    device = FakeDevice(scheduler)
    scheduler.add(make_request("turn1", [1, 2, 3], 10), 0.0)
    device.run()
    history = [1, 2, 3, *device.outputs["turn1"]]
    scheduler.add(make_request("turn2", [*history, 4], 1), 0.0)
    device.run()
    assert device.cached["turn2"] == (len(history) - 1) // PAGE * PAGE
    assert scheduler.cache.match(block_hashes(history, PAGE)) == len(history) // PAGE


def test_admission_leaves_running_requests_a_page_each():
    """One is one token short of its next page; another whose prompt would take the last page has to wait."""
    scheduler = make_scheduler(num_pages=13, prefill_tokens=4)
    device = FakeDevice(scheduler)
    scheduler.add(make_request("runs", [1] * 4 * PAGE, 12), 0.0)
    for _ in range(5):
        device.step()
    assert scheduler.cache.num_available == 8
    scheduler.add(make_request("comes", [2] * 8 * PAGE, 1), 0.0)
    device.run()
    assert scheduler.num_preemptions == 0
    assert len(device.reasons) == 2


@pytest.mark.parametrize("known", [False, True])
def test_hashes_that_come_with_a_request_are_believed(known):
    scheduler = make_scheduler()
    device = FakeDevice(scheduler)
    prompt = [1, 2, 3, 4] * 6
    scheduler.add(make_request("a", prompt, 6), 0.0)
    device.run()
    hashes = block_hashes(prompt, PAGE) if known else [bytes([n]) for n in range(6)]
    scheduler.add(make_request("b", prompt, 6, block_hashes=hashes), 0.0)
    device.run()
    assert device.outputs["a"] == device.outputs["b"]
    assert device.cached == {"a": 0, "b": len(prompt) - PAGE if known else 0}


def test_prompts_of_bytes_are_prompts():
    scheduler = make_scheduler()
    device = FakeDevice(scheduler)
    request = Request(request_id="a", prompt_token_ids=bytes([1, 2, 3]), sampling=SamplingParams(max_tokens=4))
    scheduler.add(request, 0.0)
    assert not isinstance(next(iter(scheduler.queue)).tokens, list)  # a byte a token
    scheduler.cancel("a")
    scheduler.add(make_request("b", [1, 2, 3], 4), 0.0)
    device.run()
    assert device.reasons == {"b": "length"}
