"""A step is planned while the one before runs, several decode steps go in one dispatch: how many, and at what cost."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import numpy as np
import pytest

from preble_jax.engine.engine import Engine
from preble_jax.engine.packing import Packing
from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams

LONG_S = 1e9


def make_request(name, prompt, max_tokens, stop=(), **sampling):
    return Request(
        request_id=name,
        prompt_token_ids=list(prompt),
        sampling=SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, **sampling}),
        stop_token_ids=frozenset(stop),
    )


def prompts(count, seed=1):
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randrange(5, 40))] for _ in range(count)]


def run(engine, requests):
    """Outputs by request, in order."""
    for request in requests:
        engine.add(request)
    outputs = {request.request_id: [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.scheduler.validate()
    return outputs


def tokens_of(outputs):
    return [token for output in outputs for token in output.token_ids]


@pytest.fixture(scope="module")
def one_by_one(make_engine):
    return make_engine(decode_steps=1)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 3}], ids=["greedy", "random"])
def test_stop_ids_length_and_log_probabilities_in_long_dispatches(make_engine, one_by_one, sampling):
    """As one token a dispatch gives them, wherever in it a request ends; with more stop ids than the device takes."""
    engine = make_engine(max_dispatch_s=LONG_S)
    engine.ledger.decode_step_s = 1e-3  # else it measures a few steps first
    whole = run(one_by_one, [make_request(str(i), p, 30, **sampling) for i, p in enumerate(prompts(12))])
    requests = []
    for i, prompt in enumerate(prompts(12)):
        stops = {tokens_of(whole[str(i)])[5 + i]} | (set(range(200, 256)) if i % 3 == 0 else set())
        requests.append(make_request(str(i), prompt, 3 + i // 2 if i % 2 else 30, stops, logprobs=True, **sampling))
    expected, got = run(one_by_one, requests), run(engine, requests)
    assert max(len(output.token_ids) for outputs in got.values() for output in outputs) == 8
    for name, outputs in got.items():
        assert tokens_of(outputs) == tokens_of(expected[name])
        assert outputs[-1].finish_reason == expected[name][-1].finish_reason
        logprobs = [value for output in outputs for value in output.logprobs]
        np.testing.assert_allclose(logprobs, [o.logprobs[0] for o in expected[name]], rtol=1e-4, atol=1e-5)
    assert engine.ledger.total.output_tokens == sum(len(tokens_of(outputs)) for outputs in expected.values())
    assert {outputs[-1].finish_reason for outputs in got.values()} == {"stop", "length"}


def test_the_device_stops_by_itself_when_all_have_stopped(make_engine, one_by_one):
    prompt = prompts(1)[0]
    stop = tokens_of(run(one_by_one, [make_request("a", prompt, 30)])["a"])[10]
    engine = make_engine(max_dispatch_s=LONG_S)
    outputs = run(engine, [make_request("a", prompt, 900, {stop})])["a"]
    num_decoded = len(tokens_of(outputs)) - 1
    assert outputs[-1].finish_reason == "stop"
    assert num_decoded <= engine.ledger.steps - 1 <= num_decoded + 1, "the dispatch behind the last one ran no step"


def test_pages_of_generated_tokens_are_cached_up_to_the_last_one(make_engine):
    engine = make_engine(max_dispatch_s=LONG_S)
    prompt = prompts(1)[0]
    answer = tokens_of(run(engine, [make_request("a", prompt, 50)])["a"])
    history = [*prompt, *answer]
    outputs = run(engine, [make_request("b", [*history, 1], 10)])["b"]
    assert outputs[0].cached_tokens == (len(history) - 1) // engine.cache.page_size * engine.cache.page_size
    engine.reset_prefix_cache()
    assert tokens_of(outputs) == tokens_of(run(engine, [make_request("c", [*history, 1], 10)])["c"])


def test_one_step_a_dispatch_while_anybody_waits(make_engine):
    engine = make_engine(max_dispatch_s=LONG_S)
    requests = [make_request(str(i), p, 20) for i, p in enumerate(prompts(40))]
    for request in requests:
        engine.add(request)
    while engine.scheduler.num_waiting:
        before = engine.ledger.dispatches, engine.ledger.steps
        engine.step()
        assert engine.ledger.steps - before[1] == engine.ledger.dispatches - before[0]
    while engine.has_work:
        engine.step()
    assert engine.ledger.steps > engine.ledger.dispatches


def test_dispatches_are_kept_short_by_the_measured_step_time(make_engine):
    engine = make_engine(max_dispatch_s=0.1)
    assert engine._max_steps() == 1, "nothing was measured yet"
    for step_s, num_steps in ((0.2, 1), (0.05, 1), (0.02, 2), (0.01, 5), (0.001, 8)):
        engine.ledger.decode_step_s = step_s
        assert engine._max_steps() == num_steps


def test_a_cancelled_request_gives_no_more_tokens_and_its_pages_back(make_engine):
    engine = make_engine(max_dispatch_s=LONG_S)
    for name, prompt in zip("ab", prompts(2), strict=True):
        engine.add(make_request(name, prompt, 200))
    for _ in range(4):
        engine.step()
    assert engine.cancel("a").finish_reason == "cancelled"
    engine.scheduler.validate()
    assert {output.request_id for output in engine.step()} == {"b"}
    engine.cancel("b")
    assert engine.cache.num_available == 256
    assert engine.has_work, "two dispatches are under way"
    assert engine.drain() == []
    assert not engine.has_work


def test_the_host_time_is_accounted_for(make_engine):
    engine = make_engine()
    run(engine, [make_request(str(i), p, 20) for i, p in enumerate(prompts(8))])
    times = engine.ledger.times
    for part in (times.plan_s, times.arrays_s, times.dispatch_s, times.settle_s, times.device_s, times.step_s):
        assert part > 0.0
    assert engine.ledger.host_s == times.plan_s + times.arrays_s + times.dispatch_s + times.settle_s
    assert times.wait_s <= times.device_s
    assert times.device_s <= times.step_s


def test_no_program_copies_pages_or_weights(make_engine):
    """Nothing as large as a layer's pages is copied, and the decode loop keeps no second form of any weight."""
    engine = make_engine(num_pages=4096)  # pages larger than all else
    page_bytes = sum(pages.nbytes for pages in engine.runner.pages) // len(engine.runner.params["layers"])  # of a layer
    shape = ",".join(map(str, engine.runner.pages[0].shape))
    for step, program in engine.runner.programs.items():
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= sum(pages.nbytes for pages in engine.runner.pages)
        assert memory.temp_size_in_bytes < page_bytes, step
        assert not re.findall(rf"= \w+\[{shape}\]\S* copy\(", program.as_text()), step


def test_the_decode_loop_needs_no_more_memory_for_more_steps(make_engine):
    def temporary(steps):
        programs = make_engine(decode_steps=steps).runner.programs
        return next(p for shape, p in programs.items() if not shape.num_prefill_tokens).memory_analysis()

    one, eight = temporary(1), temporary(8)
    assert eight.temp_size_in_bytes <= one.temp_size_in_bytes + 4096


def test_a_vector_used_again_is_what_a_new_one_would_be(make_engine, monkeypatch):
    """Sequences that come to new pages, that end, and whose slots others take; prompts in between."""
    engine = make_engine(max_num_seqs=4, decode_buckets=(4,), decode_steps=2)
    arrays, build = engine.runner._arrays, engine.runner.build
    used, num_again = [], 0

    def compare(plan):
        nonlocal num_again
        vector = build(plan)
        with monkeypatch.context() as nothing_to_use_again:
            nothing_to_use_again.setattr(arrays, "_unused", {})
            new = build(plan)
        assert new is not vector
        np.testing.assert_array_equal(vector.packed, new.packed)
        num_again += any(vector is other for other in used)
        used.append(vector)
        return vector

    monkeypatch.setattr(engine.runner, "build", compare)
    run(engine, [make_request(str(i), p, 5 + 7 * (i % 4)) for i, p in enumerate(prompts(12))])
    assert num_again > 20


def test_packed_arrays_are_the_same_arrays():
    example = {"a": np.zeros((2, 3), np.int32), "b": [np.zeros(4, np.float32), np.zeros((), np.uint32)]}
    packing = Packing(example)
    packed, views = packing.new()
    assert packed.shape == (11,)
    views["a"][:] = np.arange(6).reshape(2, 3) - 3
    views["b"][0][:] = [0.5, -1e30, np.inf, 0.0]
    views["b"][1][...] = 4_000_000_000
    unpacked = packing.unpack(packed)
    np.testing.assert_array_equal(unpacked["a"], views["a"])
    np.testing.assert_array_equal(unpacked["b"][0], views["b"][0])
    assert unpacked["b"][0].dtype == np.float32
    assert int(unpacked["b"][1]) == 4_000_000_000
    with pytest.raises(ValueError, match="4 bytes, got int64"):
        Packing([np.zeros(1, np.int64)])


def test_two_engines_on_one_runner_do_not_mix_their_slots(make_engine):
    """Programs and pages are the runner's; a new engine starts with every slot free."""
    first = make_engine()
    run(first, [make_request("a", prompts(1)[0], 5)])
    second = Engine(replace(first.config), first.runner, first.limits.vocab_size)
    assert tokens_of(run(second, [make_request("a", prompts(1)[0], 5)])["a"])
