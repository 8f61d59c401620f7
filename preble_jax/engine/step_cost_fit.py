"""Step costs from measured steps: least squares of relative errors, no cost below zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from preble_jax.sched.step_costs import KEY_TERMS, KeyCosts, StepCosts, StepKind

_SWEEPS = 20_000
_TOLERANCE = 1e-12
# A term that what was measured hardly tells from others stays small rather than arbitrary.
_RIDGE = 1e-6
_LEAST_SHARE = 0.05


def fit_step_costs(
    measured: Mapping[StepKind, float],
    *,
    decode_slots: Sequence[int],
    prefill_tokens: Sequence[int],
    min_sharers: int,
    tile: int,
) -> StepCosts:
    """measured: seconds of each kind of step, at least one with and one without chunks. decode_slots, prefill_tokens:
    of the compiled shapes, those left out in which nothing was measured. min_sharers, tile: as in StepCosts."""
    decode_slots = _reached(decode_slots, (kind.num_decode for kind in measured if not kind.chunks))
    prefill_tokens = _reached(prefill_tokens, (kind.num_extend for kind in measured if kind.chunks))
    shapes = StepCosts(
        decode_s=tuple((slots, 1.0) for slots in decode_slots),
        mixed_s=tuple((tokens, 1.0) for tokens in prefill_tokens),
        keys=KeyCosts(),
        min_sharers=min_sharers,
        tile=tile,
    )
    terms = np.array([step_terms(kind, shapes) for kind in measured])
    num_decode, num_shapes = len(decode_slots), len(decode_slots) + len(prefill_tokens)
    times = np.array(list(measured.values()))
    # What a shape costs before any key is read: some share of its quickest step, however noisy the machine.
    quickest = [times[terms[:, k] > 0].min() for k in range(num_shapes)]
    floor = np.array([*(_LEAST_SHARE * value for value in quickest), *([0.0] * (len(KEY_TERMS) + 1))])
    found = fit_bounded(terms, times, floor).tolist()
    seconds = [float(f"{value:.4g}") for value in found]
    return StepCosts(
        decode_s=tuple(zip(decode_slots, seconds[:num_decode], strict=True)),
        mixed_s=tuple(zip(prefill_tokens, seconds[num_decode:num_shapes], strict=True)),
        keys=KeyCosts(**dict(zip(KEY_TERMS, seconds[num_shapes:-1], strict=True))),
        min_sharers=min_sharers,
        tile=tile,
        dispatch_s=seconds[-1],
    )


def _reached(sizes: Sequence[int], seen: Iterable[int]) -> list[int]:
    return sorted({next(size for size in sizes if size >= num) for num in seen})


def fit_bounded(terms: np.ndarray, seconds: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """x >= floor with the least sum of squares of (terms x - seconds) / seconds. terms [N, K], seconds [N] above 0,
    floor [K] at least 0.

    Coordinate descent: each x in turn takes its best value given the others, which converges for a convex square.
    """
    rows = terms / seconds[:, None]
    scale = np.maximum(np.sqrt((rows**2).sum(axis=0)), 1e-30)
    rows = rows / scale
    gram = rows.T @ rows + _RIDGE * np.eye(rows.shape[1])
    moment = rows.sum(axis=0)
    least = floor * scale
    x = least.copy()
    for _ in range(_SWEEPS):
        largest = 0.0
        for k in range(len(x)):
            best = max(least[k], x[k] + (moment[k] - gram[k] @ x) / gram[k, k])
            largest = max(largest, abs(best - x[k]))
            x[k] = best
        if largest < _TOLERANCE:
            break
    found: np.ndarray = np.maximum(x / scale, floor)  # rounded otherwise
    return found


def step_terms(kind: StepKind, shapes: StepCosts) -> list[float]:
    """What the costs are multiplied by: 1 for the shape it runs in, 0 for the others, then the sizes of KEY_TERMS, and
    the step's share of a dispatch.

    As `StepCosts.seconds` is linear in the costs, this is what it says when one of them is 1 and the others are 0.
    """

    def seconds(decode: int, mixed: int, dispatch_s: float = 0.0, **keys: float) -> float:
        costs = StepCosts(
            decode_s=tuple((slots, float(i == decode)) for i, (slots, _) in enumerate(shapes.decode_s)),
            mixed_s=tuple((tokens, float(i == mixed)) for i, (tokens, _) in enumerate(shapes.mixed_s)),
            keys=KeyCosts(**keys),
            min_sharers=shapes.min_sharers,
            tile=shapes.tile,
            dispatch_s=dispatch_s,
        )
        return costs.seconds(kind)

    return [
        *(seconds(i, -1) for i in range(len(shapes.decode_s))),
        *(seconds(-1, i) for i in range(len(shapes.mixed_s))),
        *(seconds(-1, -1, **{name: 1.0}) for name in KEY_TERMS),
        seconds(-1, -1, 1.0),
    ]
