"""Profiling: the fit, and that a measurement leaves an engine as it was."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble_jax.engine.profile import Profile, fit_line, measure
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
