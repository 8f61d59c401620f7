"""A straight line through measured seconds."""

from __future__ import annotations

from collections.abc import Mapping


def fit_line(points: Mapping[int, float]) -> tuple[float, float]:
    """(base, slope): least squares of relative errors, base at least 0. A single point is all slope."""
    weights = {x: 1 / y**2 for x, y in points.items()}
    total = sum(weights.values())
    mean_x = sum(w * x for x, w in weights.items()) / total
    mean_y = sum(weights[x] * y for x, y in points.items()) / total
    spread = sum(w * (x - mean_x) ** 2 for x, w in weights.items())
    slope = sum(weights[x] * (x - mean_x) * (y - mean_y) for x, y in points.items()) / spread if spread else 0.0
    if slope > 0.0 and mean_y > slope * mean_x:
        return mean_y - slope * mean_x, slope
    # The line through 0 that is best in the same sense.
    return 0.0, sum(weights[x] * x * y for x, y in points.items()) / sum(w * x * x for x, w in weights.items())
