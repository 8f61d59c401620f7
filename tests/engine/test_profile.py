"""Profiling: the fit, and that a measurement leaves an engine as it was."""

from __future__ import annotations

import json
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_pallas.families import FamilyPlanner
from kernels_pallas.family_costs import family_costs
from preble_jax.engine.profile import Profile, fit_line, measure, min_sharers
from preble_jax.progress import NullProgress
from preble_jax.sched.step_costs import StepCosts

SECONDS = st.floats(1e-4, 10.0)


@given(base=st.floats(0.0, 1.0), slope=st.floats(1e-5, 1.0))
def test_a_line_is_found(base, slope):
    found = fit_line({x: base + slope * x for x in (64, 128, 512, 2048)})
    assert found == pytest.approx((base, slope), rel=1e-6, abs=1e-9)


@given(st.dictionaries(st.integers(1, 4096), SECONDS, min_size=1))
def test_costs_are_never_negative(points):
    base, slope = fit_line(points)
    assert base >= 0.0
    assert slope >= 0.0


@pytest.mark.parametrize("backend", ["jnp", "cpu"])
def test_keys_are_read_once_from_as_many_on_as_the_planner_says(backend):
    """Beside n sequences with 64 pages in common and one of their own: a family of all of them, or none."""
    planner = FamilyPlanner(page_size=16, costs=family_costs(backend))
    sizes = {"num_decode_slots": 16, "num_tokens": 16}
    counts = []
    for num in range(1, 17):
        page_table = np.array([[*range(64), 64 + row] for row in range(16)], np.int32)
        kv_lens = np.where(np.arange(16) < num, 65 * 16, 0).astype(np.int32)
        shared = planner.plan(page_table, np.arange(17, dtype=np.int32), kv_lens, **sizes)
        counts.append(int(shared.num_families[0]))
    first = counts.index(1) + 1
    assert counts == [0] * (first - 1) + [1] * (17 - first)
    assert min_sharers(family_costs(backend)) == first


def test_an_output_token_costs_its_share_of_a_batch():
    profile = Profile(prefill_s={100: 1.0, 200: 1.5}, decode_step_s={1: 0.5, 8: 0.8, 16: 1.0}, context_tokens=64)
    assert profile.costs() == {"prefill_base_s": 0.5, "prefill_token_s": 0.005, "decode_token_s": 0.1}
    assert profile.prefill_errors() == pytest.approx({100: 0.0, 200: 0.0})


class FakeCrowd:
    """Counts what the engine did inside."""

    def __init__(self, engine):
        self.engine = engine
        self.dispatches = 0

    def __len__(self):
        return 3

    @contextmanager
    def busy(self):
        before = self.engine.ledger.dispatches
        yield
        self.dispatches += self.engine.ledger.dispatches - before


def test_measuring_an_engine(make_engine):
    engine = make_engine()
    crowd = FakeCrowd(engine)
    profile = measure(engine, 1, NullProgress(), crowd)
    assert list(profile.prefill_s) == [64, 128, 256, 512], "1,024 tokens do not fit into this model's context"
    assert list(profile.decode_step_s) == [1, 4, 8, 16]
    assert all(cost >= 0.0 for cost in profile.costs().values())
    assert profile.step_costs is not None
    assert StepCosts.from_json(json.loads(json.dumps(profile.step_costs.to_json()))) == profile.step_costs
    assert profile.step_errors().keys() == profile.step_s.keys()
    assert profile.crowded_step_s.keys() == profile.crowded_step_errors().keys() == profile.step_s.keys()
    assert (profile.num_neighbours, profile.crowded_step_costs is None) == (3, False)
    assert crowd.dispatches > len(profile.step_s), "measured while the others computed"
    assert profile.engine["kv_tokens"] == engine.cache.pool.num_pages * engine.config.kv.page_size
    assert not engine.has_work
    assert engine.cache.num_cached == 0
