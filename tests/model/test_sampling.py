"""The sampler against a sort-based one in numpy, and its independence of the rest of the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from preble_jax.model.sampling import SamplingArrays, Scores, _keep_likely, sample

VOCAB = 50


@jax.jit
def run(logits, settings):
    return sample(Scores.of(logits), settings)


keep_likely = jax.jit(_keep_likely)


def arrays(rows, **columns):
    result = SamplingArrays.greedy(rows)
    for name, values in columns.items():
        getattr(result, name)[:] = values
    return result


def kept_by_sorting(logits, top_k, top_p, min_p):
    """The set of tokens that may be drawn: top-k, then top-p of the rest, then min-p. Ties with the last are kept."""
    order = np.argsort(-logits, kind="stable")
    kept = set(order.tolist())
    if top_k:
        last = logits[order[min(top_k, VOCAB) - 1]]
        kept = {t for t in kept if logits[t] >= last}
    weights = np.exp(logits.astype(np.float64) - logits.max())
    if top_p < 1.0:
        total = sum(weights[t] for t in kept)
        mass, last = 0.0, None
        for token in order:
            if token in kept and mass < top_p * total:
                mass += weights[token]
                last = logits[token]
        kept = {t for t in kept if logits[t] >= last}
    return {t for t in kept if weights[t] >= min_p}


@settings(max_examples=200, deadline=None)
@example(seed=115, top_k=18, top_p=1.0, min_p=0.0, ties=True)  # the last of the top 18 are 0.0 and -0.0
@given(
    st.integers(0, 2**31),
    st.integers(0, VOCAB + 10),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
    st.booleans(),
)
def test_the_kept_set_is_that_of_a_sort(seed, top_k, top_p, min_p, ties):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(1, VOCAB)).astype(np.float32) * 3
    if ties:
        logits = np.round(logits)
    settings = arrays(1, temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    got = np.isfinite(np.asarray(keep_likely(jnp.asarray(logits), settings)))[0]
    want = kept_by_sorting(logits[0], top_k, np.float32(top_p), np.float32(min_p))
    # The mass at the edge of the nucleus is a sum of floats: a token may fall either way by rounding.
    assert len(set(np.flatnonzero(got).tolist()) ^ want) <= (1 if not ties else VOCAB * (top_p < 1.0))
    if top_p == 1.0:
        assert set(np.flatnonzero(got).tolist()) == want


def test_known_nucleus():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    kept = [
        np.flatnonzero(
            np.isfinite(np.asarray(keep_likely(jnp.asarray(logits), arrays(1, temperature=1.0, **s)))[0])
        ).tolist()
        for s in (
            {"top_p": 0.5},
            {"top_p": 0.51},
            {"top_p": 0.9},
            {"top_k": 3},
            {"top_k": 3, "top_p": 0.8},
            {"min_p": 0.2},
        )
    ]
    assert kept == [[0], [0, 1], [0, 1, 2], [0, 1, 2], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize("vocab", [1, 511, 512, 513, 2000])
def test_greedy_takes_the_first_of_equal_logits(vocab):
    logits = np.random.default_rng(vocab).integers(0, 3, (40, vocab)).astype(np.float32)
    logits[0] = 0.0
    logits[1, -1] = 9.0
    tokens, _ = run(logits, SamplingArrays.greedy(40))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


def test_greedy_rows_take_the_most_likely_token_and_its_log_probability():
    logits = np.random.default_rng(0).normal(size=(8, VOCAB)).astype(np.float32)
    temperature = np.array([0, 1] * 4, np.float32)
    tokens, logprobs = run(logits, arrays(8, temperature=temperature, seed=np.arange(8)))
    assert (np.asarray(tokens)[::2] == logits.argmax(axis=1)[::2]).all()
    log_softmax = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(np.asarray(logprobs), log_softmax[np.arange(8), np.asarray(tokens)], rtol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(16, VOCAB)).astype(np.float32)
    columns = {
        "temperature": rng.uniform(0.5, 1.5, 16),
        "top_k": rng.integers(0, 20, 16),
        "top_p": rng.uniform(0.5, 1.0, 16),
        "min_p": rng.uniform(0, 0.1, 16),
        "seed": rng.integers(0, 2**32, 16, dtype=np.uint32),
        "num_made": rng.integers(0, 100, 16),
    }
    together = np.asarray(run(logits, arrays(16, **columns))[0])
    for row in range(16):
        alone = run(logits[[row, row]], arrays(2, **{k: [v[row], v[row]] for k, v in columns.items()}))[0]
        assert np.asarray(alone).tolist() == [together[row]] * 2


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.7, 0), (1.5, 3)])
def test_draws_follow_the_distribution(temperature, top_k):
    """20,000 draws: every frequency within 5 standard deviations of its probability."""
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0], np.float32)
    draws = 20_000
    tokens = np.asarray(
        run(
            np.tile(logits, (draws, 1)),
            arrays(draws, temperature=temperature, top_k=top_k, seed=7, num_made=np.arange(draws)),
        )[0]
    )
    weights = np.exp(logits.astype(np.float64) / temperature)
    if top_k:
        weights[top_k:] = 0
    probabilities = weights / weights.sum()
    frequencies = np.bincount(tokens, minlength=5) / draws
    allowed = 5 * np.sqrt(probabilities * (1 - probabilities) / draws)
    assert (np.abs(frequencies - probabilities) <= allowed).all()


def test_seed_and_position_decide():
    logits = np.zeros((4, VOCAB), np.float32)
    tokens = np.asarray(run(logits, arrays(4, temperature=1.0, seed=[1, 1, 1, 2], num_made=[0, 0, 1, 0]))[0])
    assert tokens[0] == tokens[1]
    assert tokens[0] != tokens[2] or tokens[0] != tokens[3]
