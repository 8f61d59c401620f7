"""A device group's cost model, refined from the step timings it reports.

The model of a step: seconds = base + token * prompt tokens + row * decode rows. A report covers a few steps, so that
each difference of two reports is one observation of the sums: seconds = base * steps + token * tokens + row * rows.
Fitted by least squares with an exponential memory, held to the profile's values as far as nothing was observed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from preble_jax.sched.cost import PROFILED_ROWS, LinearCostModel


class StepTotals(NamedTuple):
    """Of all steps since a group started."""

    steps: int
    prefill_tokens: int
    decode_rows: int
    seconds: float


class StepFit:
    """memory_s: seconds of step time after which an observation counts 1/e. prior_s: how many such seconds the starting
    values weigh. refit_s: step time between two refinements.

    Costs (base, token, row) are kept relative to the starting values, so that the three are of one size; they never
    become negative. A group that prefills only, say, leaves `row` where it was: the starting values pull on each alone.
    """

    def __init__(
        self, start: LinearCostModel, *, memory_s: float = 60.0, prior_s: float = 2.0, refit_s: float = 1.0
    ) -> None:
        costs = (start.prefill_base_s, start.prefill_token_s, start.decode_row_s)
        self._scale = [max(cost, 1e-9) for cost in costs]
        self._memory_s = memory_s
        self._prior_s = prior_s
        self._refit_s = refit_s
        self._last: StepTotals | None = None
        self._gram = [[0.0] * 3 for _ in range(3)]
        self._moment = [0.0] * 3
        self._steps = 1.0
        self._rows = PROFILED_ROWS
        self._unused_s = 0.0

    def observe(self, totals: StepTotals) -> LinearCostModel | None:
        """The refined model when it is time for one. Totals that went back are those of a group that started anew."""
        last, self._last = self._last, totals
        if last is None or totals.seconds <= last.seconds:
            return None
        terms = [float(now - then) for now, then in zip(totals[:3], last[:3], strict=True)]
        seconds = totals.seconds - last.seconds
        if terms[0] <= 0.0 or min(terms) < 0.0:
            return None
        self._remember(terms, seconds)
        self._unused_s += seconds
        if self._unused_s < self._refit_s:
            return None
        self._unused_s = 0.0
        return self._model()

    def _remember(self, terms: list[float], seconds: float) -> None:
        """The error of a sum grows as the sum: its square is weighed by 1 / seconds."""
        keep = math.exp(-seconds / self._memory_s)
        scaled = [term * scale for term, scale in zip(terms, self._scale, strict=True)]
        # A moment's term is this, times seconds, by seconds.
        self._moment = [keep * kept + term for kept, term in zip(self._moment, scaled, strict=True)]
        self._gram = [
            [keep * kept + term * other / seconds for kept, other in zip(row, scaled, strict=True)]
            for row, term in zip(self._gram, scaled, strict=True)
        ]
        self._steps = keep * self._steps + terms[0]
        self._rows = keep * self._rows + terms[2]

    def _model(self) -> LinearCostModel:
        gram = [[value + self._prior_s * (i == j) for j, value in enumerate(row)] for i, row in enumerate(self._gram)]
        factors = solve_nonnegative(gram, [value + self._prior_s for value in self._moment])
        base_s, token_s, row_s = (factor * scale for factor, scale in zip(factors, self._scale, strict=True))
        # An output token costs its row, and its share of the step that carries it.
        rows_per_step = max(1.0, self._rows / self._steps)
        return LinearCostModel(
            prefill_base_s=base_s,
            prefill_token_s=token_s,
            decode_token_s=row_s + base_s / rows_per_step,
            decode_row_s=row_s,
        )


def solve_nonnegative(gram: list[list[float]], moment: list[float]) -> list[float]:
    """x >= 0 that minimises x' gram x - 2 moment' x, gram positive definite and small: the best of the least-squares
    solutions of all subsets of coordinates that has no negative one (Lawson and Hanson's problem, by enumeration; what
    is mostly so: that of all coordinates has none, and none is better)."""
    size = len(moment)
    values = _solve(gram, moment)
    if min(values) >= 0.0:
        return values
    best, best_cost = [0.0] * size, 0.0
    for subset in range(1, 1 << size):
        free = [i for i in range(size) if subset >> i & 1]
        values = _solve([[gram[i][j] for j in free] for i in free], [moment[i] for i in free])
        if min(values) < 0.0:
            continue
        cost = -sum(value * moment[i] for value, i in zip(values, free, strict=True))  # the minimum's value
        if cost < best_cost:
            best, best_cost = [0.0] * size, cost
            for value, i in zip(values, free, strict=True):
                best[i] = value
    return best


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination; positive definite, so no pivoting is needed."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for i in range(size):
        for k in range(i + 1, size):
            factor = rows[k][i] / rows[i][i]
            for j in range(i, size + 1):
                rows[k][j] -= factor * rows[i][j]
    solution = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][j] * solution[j] for j in range(i + 1, size))
        solution[i] = (rows[i][size] - known) / rows[i][i]
    return solution
