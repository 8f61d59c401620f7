"""When requests are sent: a renewal process on a clock that runs faster and slower, or times that are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from preble_jax.errors import ConfigError

Times = NDArray[np.float64]


class Arrivals(Protocol):
    def times(self, rng: np.random.Generator, rate: float, count: int) -> Times:
        """The first `count` arrivals in seconds, in order, `rate` a second in the long run.

        Equal generators and rates: a smaller count is a prefix of a larger one.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Renewal:
    """Independent gaps with coefficient of variation `cv`: 1 is Poisson, above it bursts (gamma), 0 even.

    phases: (seconds, level), repeated: the rate is in proportion to the level, and `rate` is
    the mean of a whole round. On and off: ((60, 1), (60, 0)). Even gaps start at a random time.
    """

    cv: float = 1.0
    phases: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if not self.cv >= 0:
            raise ConfigError(f"arrivals: expected a cv of at least 0, got {self.cv}; 1 is Poisson")
        if self.phases and not (
            all(seconds > 0 and level >= 0 for seconds, level in self.phases)
            and any(level > 0 for _, level in self.phases)
        ):
            raise ConfigError(
                f"arrivals: expected phases of more than 0 seconds with levels >= 0, one above, got {self.phases}"
            )

    def times(self, rng: np.random.Generator, rate: float, count: int) -> Times:
        return self._clock(np.cumsum(self._gaps(rng, count)) / rate)

    def _gaps(self, rng: np.random.Generator, count: int) -> Times:
        if self.cv == 0:
            gaps = np.ones(count)
            gaps[:1] = rng.random()
            return gaps
        if self.cv == 1:
            return rng.standard_exponential(count)
        shape = 1 / self.cv**2
        return rng.standard_gamma(shape, count) / shape

    def _clock(self, even: Times) -> Times:
        """From times at an even rate to times at which as much of the phases' level has passed."""
        if not self.phases:
            return even
        seconds, levels = np.array(self.phases, dtype=np.float64).T
        ends = np.cumsum(seconds)
        period = float(ends[-1])
        passed = np.cumsum(seconds * levels)
        passed *= period / passed[-1]
        rounds, within = np.divmod(even, period)
        live = levels > 0  # off phases are steps, which have no inverse: only their ends are kept, as jumps
        knots_x = np.stack([np.concatenate(([0.0], passed[:-1]))[live], passed[live]], axis=1).ravel()
        knots_y = np.stack([(ends - seconds)[live], ends[live]], axis=1).ravel()
        times: Times = rounds * period + np.interp(within, knots_x, knots_y)
        return times


@dataclass(frozen=True, kw_only=True)
class Given:
    """Times that were measured (seconds, in order), stretched to the rate that is asked for; repeated when too few."""

    at_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.at_s) < 2:
            raise ConfigError(f"arrivals: expected 2 times or more, got {len(self.at_s)}; take more of the trace")
        if np.any(np.diff(self.at_s) < 0):
            raise ConfigError("arrivals: expected times in order, got some that run backwards; sort them")
        if self.at_s[-1] == self.at_s[0]:
            raise ConfigError(
                f"arrivals: expected times that advance, got {len(self.at_s)} at one time, which cannot be stretched to"
                " a rate; give a trace whose requests come at different times"
            )

    def times(self, rng: np.random.Generator, rate: float, count: int) -> Times:
        at = np.array(self.at_s) - self.at_s[0]
        mean_gap = float(at[-1]) / (len(at) - 1)
        rounds, position = np.divmod(np.arange(count), len(at))
        times: Times = (rounds * (at[-1] + mean_gap) + at[position]) / (mean_gap * rate)
        return times


def until(arrivals: Arrivals, seed: np.random.SeedSequence, rate: float, end_s: float) -> Times:
    """All arrivals up to end_s."""
    count = int(rate * end_s + 6 * (rate * end_s) ** 0.5) + 16
    while True:
        times = arrivals.times(np.random.default_rng(seed), rate, count)
        if times[-1] > end_s:
            return times[times <= end_s]
        count *= 2
