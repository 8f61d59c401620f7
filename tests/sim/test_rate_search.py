"""The search for a capacity: right whatever it begins with, and few probes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble_jax.sim.rate_search import LEAST_RATE, MOST_RATE, rate_at, search_steps, step_at


def search(
    start: int,
    stride: int,
    capacity: float,
    tolerance: float = 0.03,
    power: float = 5.0,
    short_from: float = math.inf,
) -> tuple[int | None, list[int]]:
    """(result, probes) where the value reaches its limit at `capacity` and grows with a power of the rate."""
    steps = search_steps(start, stride, tolerance, lambda step: step >= short_from)
    probed = [next(steps)]
    while True:
        rate = rate_at(probed[-1], tolerance)
        try:
            probed.append(steps.send((rate / capacity) ** power if rate <= capacity else math.inf))
        except StopIteration as done:
            return done.value, probed


@given(
    capacity=st.floats(LEAST_RATE * 2, MOST_RATE / 2),
    start=st.integers(-300, 400),
    stride=st.integers(1, 8),
    tolerance=st.floats(0.01, 0.5),
    power=st.sampled_from([0.0, 0.3, 3.0, 5.0, 40.0]),
    short_from=st.one_of(st.just(math.inf), st.integers(-300, 400)),
)
def test_the_highest_rate_that_passes(
    capacity: float, start: int, stride: int, tolerance: float, power: float, short_from: float
) -> None:
    step, probed = search(start, stride, capacity, tolerance, power, short_from)
    assert step is not None
    assert rate_at(step, tolerance) <= capacity < rate_at(step + 1, tolerance)
    assert len(set(probed)) == len(probed), "nothing is probed twice"


def test_from_where_it_ends_two_probes_are_enough() -> None:
    assert search(50, 1, rate_at(50, 0.03)) == (50, [50, 51])
    assert search(51, 1, rate_at(50, 0.03)) == (50, [51, 50])


def test_few_runs_pass() -> None:
    """Those are the expensive ones. From above in small steps; from below in one leap, as far as the value says."""
    assert search(53, 1, rate_at(50, 0.03)) == (50, [53, 52, 51, 50])
    assert search(40, 1, rate_at(50, 0.03)) == (50, [40, 51, 50])
    assert search(40, 1, rate_at(50, 0.03), power=2.5) == (50, [40, 46, 49, 50, 51])
    assert search(40, 1, rate_at(50, 0.03), power=8.0) == (50, [40, 57, 56, 55, 54, 52, 48, 51, 50])
    assert search(58, 1, rate_at(50, 0.03)) == (50, [58, 57, 56, 55, 53, 49, 51, 50])


def test_what_never_passes_and_what_never_fails() -> None:
    for steps, ratio, last, result in (
        (search_steps(50, 4, 0.03), math.inf, LEAST_RATE, None),
        (search_steps(50, 4, 0.03), 0.0, MOST_RATE, step_at(MOST_RATE, 0.03)),
    ):
        probed = [next(steps)]
        with pytest.raises(StopIteration) as done:
            while len(probed) < 40:
                probed.append(steps.send(ratio))
        assert done.value.value == result and probed[-1] == step_at(last, 0.03)


def test_a_burst_that_drains_just_in_time_is_not_followed_step_by_step() -> None:
    """The value stays just below its limit over a range of 300 steps."""
    step, probed = search(50, 4, rate_at(311, 0.03), power=1e-3, short_from=60)
    assert (step, len(search(50, 4, rate_at(311, 0.03), power=1e-3)[1])) == (311, 263)
    assert step_at(MOST_RATE, 0.03) in probed and len(probed) < 22


def test_grid_points_name_themselves() -> None:
    assert all(step_at(rate_at(step, 0.03), 0.03) == step for step in range(-230, 380))
