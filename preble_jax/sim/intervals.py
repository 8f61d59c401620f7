"""Means of a few seeds, with what they may be off by."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Student's t, two-sided 95%, by degrees of freedom; beyond the table the normal distribution's.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_NORMAL95 = 1.960


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its 95% confidence interval); the second is 0 for a single value, NaN for none."""
    count = len(values)
    if count == 0:
        return math.nan, math.nan
    mean = sum(values) / count
    if count == 1:
        return mean, 0.0
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    t95 = _T95[count - 2] if count - 2 < len(_T95) else _NORMAL95
    return mean, t95 * deviation / math.sqrt(count)


def geometric_mean(values: Sequence[float]) -> float:
    """Of numbers above 0; NaN for none, 0 as soon as one of them is 0."""
    if not values:
        return math.nan
    if min(values) <= 0.0:
        return 0.0
    return math.exp(sum(map(math.log, values)) / len(values))
