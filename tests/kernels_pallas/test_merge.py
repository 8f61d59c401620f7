"""Merging parts by log-sum-exp equals attention over all their keys."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.merge import merge


def part(scores, values):
    if not len(scores):
        return np.zeros(values.shape[1:]), -np.inf
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum(), scores.max() + np.log(weights.sum())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=4), st.sampled_from([1.0, 30.0, 300.0]), st.integers(0, 2**31))
def test_any_number_of_parts(sizes, spread, seed):
    rng = np.random.default_rng(seed)
    scores, values = rng.normal(size=sum(sizes)) * spread, rng.normal(size=(sum(sizes), 5))
    bounds = np.cumsum([0, *sizes])
    parts = [part(scores[a:b], values[a:b]) for a, b in itertools.pairwise(bounds)]
    out, lse = merge(
        np.array([[out] for out, _ in parts], np.float32), np.array([[lse] for _, lse in parts], np.float32)
    )
    want, want_lse = part(scores, values)
    np.testing.assert_allclose(out[0], want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(lse[0], want_lse, rtol=1e-5, atol=1e-4)
