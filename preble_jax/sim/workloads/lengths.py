"""Lengths in tokens, drawn so that mean and standard deviation come out as stated in spite of the clipping."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from preble_jax.errors import ConfigError

_GRID, _GRID_END = 4001, 10.0  # points that stand for the normal distribution while another one is fitted
_FIT_STEPS = 400
_FIT_ERROR = 1e-3
_MOST_SCALE, _MOST_LOG = 30.0, 50.0  # where the fit is given up, before it overflows


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Log-normal, clipped to [low, high], fitted so that the clipped lengths have this mean and sd (in tokens).

    sd 0: always the mean. A high of 0 is no upper bound. Raises ConfigError where no such distribution exists.
    """

    mean: float
    sd: float = 0.0
    low: int = 1
    high: int = 0

    def __post_init__(self) -> None:
        top = self.high or float("inf")
        if not (1 <= self.low <= self.mean <= top and self.sd >= 0):
            raise ConfigError(f"lengths: expected 1 <= low <= mean <= high and sd >= 0, got {self}; put them in order")
        most = ((self.mean - self.low) * (top - self.mean)) ** 0.5 if self.high else float("inf")
        if self.sd and self.sd >= most:  # Bhatia-Davis: no distribution in these bounds spreads wider
            raise ConfigError(
                f"lengths: expected an sd below {most:.1f} in these bounds, got {self}; widen low and high"
            )

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """`count` independent lengths."""
        return self._at(rng.standard_normal(count))

    def spread(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """`count` lengths in random order, one from (the inner part of) each 1/count of the distribution, so that even
        few have about its mean and sd."""
        ranks = (rng.permutation(count) + 0.2 + 0.6 * rng.random(count)) / max(count, 1)
        return self._at(_normal_quantiles(ranks))

    def _at(self, normal: NDArray[np.float64]) -> NDArray[np.int64]:
        if not self.sd:
            return np.full(len(normal), round(self.mean), np.int64)
        location, scale = _fit(self)
        return np.rint(_clipped(self, location, scale, normal)).astype(np.int64)


def _clipped(lengths: Lengths, location: float, scale: float, normal: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(np.exp(np.minimum(location + scale * normal, _MOST_LOG)), lengths.low, lengths.high or np.inf)


def _normal_quantiles(ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    inverse = NormalDist().inv_cdf
    return np.array([inverse(min(max(rank, 1e-9), 1 - 1e-9)) for rank in ranks.tolist()])


@functools.cache
def _grid() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points of the normal distribution and their weights."""
    points = np.linspace(-_GRID_END, _GRID_END, _GRID)
    weights = np.exp(-(points**2) / 2)
    return points, weights / weights.sum()


@functools.cache
def _fit(lengths: Lengths) -> tuple[float, float]:
    """Location and scale of the logarithm, by matching the clipped moments one after the other until both agree."""
    points, weights = _grid()
    scale = math.log(1 + (lengths.sd / lengths.mean) ** 2) ** 0.5
    location = math.log(lengths.mean) - scale**2 / 2
    for _ in range(_FIT_STEPS):
        values = _clipped(lengths, location, scale, points)
        mean = float(weights @ values)
        sd = float(weights @ (values - mean) ** 2) ** 0.5
        if abs(mean - lengths.mean) < _FIT_ERROR * mean and abs(sd - lengths.sd) < _FIT_ERROR * lengths.sd:
            return location, scale
        scale = min(scale * (lengths.sd / max(sd, 1e-9)) ** 0.5, _MOST_SCALE)
        location += math.log(lengths.mean / float(weights @ _clipped(lengths, location, scale, points)))
    raise ConfigError(
        f"lengths: expected a clipped log-normal distribution to have this mean and sd, got {mean:.1f} and {sd:.1f} at"
        f" best for {lengths}; widen the bounds or lower the sd"
    )
