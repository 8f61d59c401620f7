"""Looks for the highest rate that passes, with few probes, on a geometric grid.

The grid (`rate_at`) is the same for every search, so that what one search has probed another one knows, and so that
seeds, which end within a step or two of each other, need two probes each when they begin where the first seed ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator

# What fails at a request in a quarter of an hour has no capacity; what passes at a hundred a millisecond is a workload
# too short to overload anything.
LEAST_RATE = 1e-3
MOST_RATE = 1e5
# Near the capacity, the p99 of waiting times grows with about this power of the rate (3 to 7 on the workloads here).
ELASTICITY = 5.0


def rate_at(step: int, tolerance: float) -> float:
    """Requests a second: (1 + tolerance) to the power of `step`, in five digits."""
    return float(f"{(1.0 + tolerance) ** step:.5g}")


def step_at(rate: float, tolerance: float) -> int:
    """The step of the grid nearest to the rate."""
    return round(math.log(rate) / math.log1p(tolerance))


def search_steps(
    start: int, stride: int, tolerance: float, over_early: Callable[[int], bool] = lambda step: False
) -> Generator[int, float, int | None]:
    """Yields steps of the grid to be probed, and is sent what came of them: the value over its limit; at most 1 passes,
    infinite is a run that was given up. Returns the highest step that passes while the next one fails, or that of
    MOST_RATE; None when nothing passes down to LEAST_RATE. Assumes that what passes at a rate passes below it.

    start: where it is expected. stride: by how many steps it may be off. over_early: of a step that passed, whether its
    requests have all come before the first of them can be late. Then it may be that no rate is too high for so few, so
    that MOST_RATE is probed at once; and the value hardly grows with the rate, so that it is no guide and the steps in
    between are halved.

    A run that passes costs all of its requests, one that fails a third of them. So from above it goes down in small
    strides (larger ones after the third), and from below as far up as the value says.
    """
    lowest, highest = step_at(LEAST_RATE, tolerance), step_at(MOST_RATE, tolerance)
    passes: int | None = None
    fails: int | None = None
    num_failed = 0  # since one passed
    bisects = False
    step = min(max(start, lowest), highest)
    while passes is None or fails is None or fails - passes > 1:
        ratio = yield step
        if ratio <= 1.0:
            passes, num_failed = step, 0
            if step >= highest:
                return highest
            if not bisects and over_early(step):
                bisects = True
                if fails is None:
                    if (yield highest) <= 1.0:
                        return highest
                    fails = highest
            step = min(step + _steps_up(ratio, tolerance), highest if fails is None else fails - 1)
        else:
            fails, num_failed = step, num_failed + 1
            if step <= lowest:
                return None
            down = (stride if passes is None else 1) * 2 ** max(0, num_failed - 3)
            step = max(step - down, lowest if passes is None else passes + 1)
        if bisects and passes is not None and fails is not None:
            step = (passes + fails) // 2
    return passes


def _steps_up(ratio: float, tolerance: float) -> int:
    """To where the value is expected to be at its limit; 1 at least, a factor of two at most."""
    most = max(1, math.ceil(math.log(2.0) / math.log1p(tolerance)))
    if ratio <= 0.0:
        return most
    return min(most, max(1, math.ceil(-math.log(ratio) / (ELASTICITY * math.log1p(tolerance)))))
