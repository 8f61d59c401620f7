"""Same prompt, same seed, same tokens - whatever happens around the request."""

from __future__ import annotations

import random
from dataclasses import replace

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams

rng = random.Random(5)
HEAD = [rng.randrange(256) for _ in range(90)]
PROMPTS = [HEAD[: rng.randrange(20, 90)] + [rng.randrange(256) for _ in range(rng.randrange(1, 70))] for _ in range(16)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
RANDOM = SamplingParams(temperature=0.9, top_p=0.9, top_k=40, seed=11, max_tokens=24)


def generate(engine, prompts, sampling, on_step=lambda engine: None, num_held=0):
    """Runs all prompts to their ends and validates the bookkeeping after each step. num_held: pages kept from them."""
    for i, prompt in enumerate(prompts):
        engine.add(Request(request_id=str(i), prompt_token_ids=prompt, sampling=sampling))
    tokens = {str(i): [] for i in range(len(prompts))}
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
        engine.cache.validate() if num_held else engine.scheduler.validate()
        on_step(engine)
    return [tokens[str(i)] for i in range(len(prompts))]


@pytest.fixture(scope="module", params=[GREEDY, RANDOM], ids=["greedy", "random"])
def sampling(request):
    return request.param


@pytest.fixture(scope="module")
def alone(make_engine, sampling):
    """Each prompt by itself, nothing cached."""
    engine = make_engine(prefix_cache=False)
    return [generate(engine, [prompt], sampling)[0] for prompt in PROMPTS]


def test_outputs_differ_from_each_other(alone):
    """Else the tests below prove little."""
    assert len({tuple(tokens) for tokens in alone}) == len(PROMPTS)


def test_in_a_batch_with_a_shared_prefix(make_engine, sampling, alone):
    engine = make_engine()
    assert generate(engine, PROMPTS, sampling) == alone
    assert engine.scheduler.num_cached_tokens > 0
    assert generate(engine, PROMPTS, sampling) == alone  # everything cached now


@pytest.mark.parametrize("chunk", [16, 64, 512])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_chunk_sizes(make_engine, sampling, alone, chunk, prefix_cache):
    engine = make_engine(prefill_buckets=(chunk,), prefix_cache=prefix_cache)
    assert generate(engine, PROMPTS, sampling) == alone


def test_several_buckets(make_engine, sampling, alone):
    assert generate(make_engine(decode_buckets=(2, 8, 16), prefill_buckets=(16, 64)), PROMPTS, sampling) == alone


def test_page_sizes(make_engine, sampling, alone):
    assert generate(make_engine(page_size=32, num_pages=64), PROMPTS, sampling) == alone


def test_forced_eviction_and_preemption(make_engine, sampling, alone):
    """The pool holds a few requests at a time; now and then everything that can be is evicted."""
    engine = make_engine(num_pages=36)
    evicted = []

    def disturb(engine):
        if engine.ledger.steps % 5 == 0:
            evicted.append(engine.cache.num_cached)
            engine.reset_prefix_cache()

    assert generate(engine, PROMPTS, sampling, disturb) == alone
    assert engine.scheduler.num_preemptions > 0
    assert sum(evicted) > 0


prompts_sharing_prefixes = st.lists(
    st.builds(
        lambda head, tail: PROMPTS[0][:head] + tail,
        st.integers(0, len(PROMPTS[0])),
        st.lists(st.integers(0, 255), min_size=1, max_size=40),
    ),
    min_size=1,
    max_size=16,
)


@settings(max_examples=30, deadline=None)
@given(prompts_sharing_prefixes, st.integers(1, 64), st.integers(20, 256), st.booleans(), st.data())
def test_any_batch_chunk_pool_and_order(make_engine, prompts, chunk, num_pages, prefix_cache, data):
    """Chunks of any length, a pool of any size (the other pages are held), requests that come and are cancelled."""
    one_by_one = make_engine(prefix_cache=False)
    expected = [generate(one_by_one, [prompt], GREEDY)[0] for prompt in prompts]
    engine = make_engine(prefix_cache=prefix_cache)
    engine.limits = engine.scheduler.limits = replace(engine.limits, prefill_tokens=chunk)
    longest = max(map(len, prompts)) + GREEDY.max_tokens
    num_pages = max(num_pages, -(-longest // engine.cache.page_size))  # nobody is let in who cannot be served alone
    held = engine.cache.open([])
    engine.cache.extend(held, 256 - num_pages)
    cancelled = data.draw(st.sets(st.integers(0, len(prompts) - 1), max_size=3))
    cancel_at = data.draw(st.integers(0, 30))

    def disturb(engine):
        if engine.ledger.steps == cancel_at:
            for i in cancelled:
                engine.cancel(str(i))

    got = generate(engine, prompts, GREEDY, disturb, num_held=256 - num_pages)
    for i, tokens in enumerate(got):
        assert tokens == expected[i][: len(tokens)]
        assert len(tokens) == len(expected[i]) or i in cancelled
    assert engine.cache.num_available == num_pages


def test_heads_that_do_not_divide_are_kept_whole(make_engine, sampling, alone):
    """4 key heads on 3 devices: attention on each of them, the rest split where it divides."""
    engine = make_engine(mesh={"tensor": 3})
    assert generate(engine, PROMPTS[:4], sampling) == alone[:4]
    assert engine.runner.pages[0].addressable_shards[0].data.shape[1] == 4


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_mesh_shapes(make_engine, sampling, alone, tensor):
    engine = make_engine(mesh={"tensor": tensor})
    assert generate(engine, PROMPTS, sampling) == alone
    qkv = engine.runner.params["layers"][0]["attention"]["qkv"]
    assert len(qkv.sharding.device_set) == tensor
    assert qkv.addressable_shards[0].data.shape[1] == 4 // tensor
    pages = engine.runner.pages[0]
    assert pages.addressable_shards[0].data.shape[1] == 4 // tensor


def test_nothing_compiles_after_warm_up(make_engine, sampling):
    engine = make_engine(decode_buckets=(2, 8, 16), prefill_buckets=(16, 64))
    generate(engine, PROMPTS, sampling)
    generate(engine, PROMPTS[:3], GREEDY)
    engine.reset_prefix_cache()
    generate(engine, PROMPTS[:1], sampling)
    assert engine.late_compiles == 0
    jax.jit(lambda x: x + 1)(1.0)  # the count can move
    generate(engine, PROMPTS[:1], sampling)
    assert engine.late_compiles > 0
