"""Lengths have the mean and sd they state, inside their bounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preble_jax.errors import ConfigError
from preble_jax.sim.workloads.lengths import Lengths


@settings(max_examples=40, deadline=None)
@given(
    mean=st.floats(20, 5000),
    spread=st.floats(0.05, 1.0),
    low=st.integers(1, 10),
    seed=st.integers(0, 5),
)
def test_unbounded_lengths_hit_mean_and_sd(mean: float, spread: float, low: int, seed: int) -> None:
    lengths = Lengths(mean=mean, sd=spread * mean, low=low)
    drawn = lengths.draw(np.random.default_rng(seed), 20_000)
    assert drawn.mean() == pytest.approx(mean, rel=0.04)
    assert drawn.std() == pytest.approx(spread * mean, rel=0.15, abs=0.5)
    assert drawn.min() >= low


@pytest.mark.parametrize(
    "lengths",
    [
        Lengths(mean=264, sd=143, low=16, high=512),
        Lengths(mean=100, sd=90, low=1, high=200),
        Lengths(mean=500, sd=20, low=1, high=512),
        Lengths(mean=5, sd=4, high=40),
    ],
)
def test_clipping_does_not_move_mean_and_sd(lengths: Lengths) -> None:
    drawn = lengths.draw(np.random.default_rng(1), 50_000)
    assert drawn.mean() == pytest.approx(lengths.mean, rel=0.02)
    assert drawn.std() == pytest.approx(lengths.sd, rel=0.03)
    assert lengths.low <= drawn.min() and drawn.max() <= lengths.high


def test_few_spread_lengths_have_the_mean_already() -> None:
    lengths = Lengths(mean=23_000, sd=6_000, low=64)
    means = [lengths.spread(np.random.default_rng(seed), 24).mean() for seed in range(20)]
    independent = [lengths.draw(np.random.default_rng(seed), 24).mean() for seed in range(20)]
    assert means == pytest.approx([23_000] * 20, rel=0.03)
    assert np.std(means) < np.std(independent) / 3
    first, second = (lengths.spread(np.random.default_rng(seed), 24) for seed in (0, 1))
    assert list(np.argsort(first)) != list(np.argsort(second)), "the order is random"


def test_without_sd_every_length_is_the_mean() -> None:
    assert set(Lengths(mean=256).draw(np.random.default_rng(0), 100).tolist()) == {256}


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": 0.5},
        {"mean": 10, "low": 20},
        {"mean": 10, "high": 5},
        {"mean": 10, "sd": -1},
        {"mean": 100, "sd": 100, "low": 1, "high": 200},  # more than all at the ends
    ],
)
def test_impossible_lengths_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="lengths: expected"):
        Lengths(**wrong)


@pytest.mark.parametrize("lengths", [Lengths(mean=511, sd=20, high=512), Lengths(mean=10, sd=100)])
def test_a_fit_that_fails_says_so(lengths: Lengths) -> None:
    with pytest.raises(ConfigError, match="best for"):
        lengths.draw(np.random.default_rng(0), 10)
