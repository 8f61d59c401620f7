"""Arrival processes: rates, variation, phases, and times that are given."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preble_jax.errors import ConfigError
from preble_jax.sim.workloads.arrivals import Given, Renewal, until


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 2.0])
def test_gaps_have_the_rate_and_the_variation(cv: float) -> None:
    times = Renewal(cv=cv).times(_rng(), 5.0, 40_000)
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.2, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    phases=st.lists(st.tuples(st.floats(1, 50), st.sampled_from([0.0, 0.5, 1.0, 4.0])), min_size=1, max_size=5).filter(
        lambda phases: any(level for _, level in phases)
    ),
    seed=st.integers(0, 3),
)
def test_phases_get_arrivals_in_proportion_to_their_level(phases: list[tuple[float, float]], seed: int) -> None:
    rate, count = 20.0, 4_000
    times = Renewal(phases=tuple(phases)).times(_rng(seed), rate, count)
    assert np.all(np.diff(times) >= 0)
    period = sum(seconds for seconds, _ in phases)
    within = np.mod(times[times < period * (times[-1] // period)], period)
    if len(within) < 1_000:
        return  # not a whole round
    work = sum(seconds * level for seconds, level in phases)
    start = 0.0
    for seconds, level in phases:
        share = np.mean((within > start) & (within < start + seconds))
        assert share == pytest.approx(seconds * level / work, abs=0.08)
        if not level:
            assert share == 0
        start += seconds


def test_on_and_off_keeps_the_mean_rate() -> None:
    times = Renewal(phases=((60.0, 1.0), (60.0, 0.0))).times(_rng(), 3.0, 20_000)
    assert len(times) / times[-1] == pytest.approx(3.0, rel=0.03)
    assert np.all(np.mod(times, 120.0) <= 60.0 + 1e-9)


def test_even_gaps_begin_at_a_random_time() -> None:
    starts = {float(Renewal(cv=0.0).times(_rng(seed), 2.0, 3)[0]) for seed in range(5)}
    assert len(starts) == 5 and max(starts) <= 0.5


@pytest.mark.parametrize(
    "arrivals", [Renewal(), Renewal(cv=2.0, phases=((3.0, 1.0), (5.0, 0.2))), Given(at_s=(3.0, 4.0, 4.5, 9.0))]
)
def test_more_arrivals_begin_with_the_same_ones(arrivals: Renewal | Given) -> None:
    few, many = (arrivals.times(_rng(7), 2.0, count) for count in (10, 50))
    assert few.tolist() == many[:10].tolist()
    assert np.all(np.diff(many) >= 0)


def test_until_gives_all_arrivals_up_to_the_end() -> None:
    seed = np.random.SeedSequence(4)
    everything = Renewal(cv=3.0).times(np.random.default_rng(seed), 10.0, 2_000)
    assert until(Renewal(cv=3.0), seed, 10.0, 50.0).tolist() == everything[everything <= 50.0].tolist()


def test_given_times_are_stretched_and_repeated() -> None:
    given_times = Given(at_s=(100.0, 101.0, 103.0))
    assert given_times.times(_rng(), 1.0, 3).tolist() == pytest.approx([0.0, 1 / 1.5, 2.0])
    assert given_times.times(_rng(), 2.0, 5).tolist() == pytest.approx([0.0, 1 / 3, 1.0, 1.5, 1.5 + 1 / 3])
    long = given_times.times(_rng(), 4.0, 3_000)
    assert len(long) / long[-1] == pytest.approx(4.0, rel=0.01)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Renewal(cv=-1.0),
        lambda: Renewal(phases=((0.0, 1.0),)),
        lambda: Renewal(phases=((10.0, 0.0),)),
        lambda: Renewal(phases=((10.0, -1.0), (10.0, 2.0))),
        lambda: Given(at_s=(1.0,)),
        lambda: Given(at_s=(1.0, 1.0)),
        lambda: Given(at_s=(1.0, 3.0, 2.0)),
    ],
)
def test_impossible_arrivals_are_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match="arrivals: expected"):
        wrong()
