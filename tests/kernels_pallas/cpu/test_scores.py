"""Scores taken by a product against NumPy's in float64: columns that tie, that fill no panel, rows that are dead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.cpu import call
from kernels_pallas.cpu.int8_matmul import int8_matmul, int8_matmul_scores, pack_int8_panels
from kernels_pallas.cpu.matmul import matmul, matmul_scores, pack_panels

ROWS, COLUMNS, NUM_IN = 150, 1700, 64  # two blocks of rows, several items; the last panel is not full


def kernels(kind: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Scores, and the values that they are of. The same 70 columns again and again, and every product is negative."""
    random = np.random.default_rng(0)
    columns = (-np.abs(random.standard_normal((1, 70, NUM_IN))) / 8)[:, np.arange(COLUMNS) % 70]
    norm, live_columns = (np.ones(NUM_IN, np.float32), 1e-5), {"num_columns": COLUMNS}
    if kind == "int8":
        panels = pack_int8_panels((columns * 127).clip(-127).astype(np.int8), np.full((1, COLUMNS), 0.01, np.float32))
        settings = {"norm": norm, "hadamard": 1}
        return (
            lambda x, live, wanted: int8_matmul_scores(x, panels, live, wanted, **settings, **live_columns),
            lambda x, live: int8_matmul(x, panels, live, **settings),
        )
    panels = pack_panels(columns.astype(jnp.bfloat16))
    return (
        lambda x, live, wanted: matmul_scores(x, panels, live, wanted, norm=norm, **live_columns),
        lambda x, live: matmul(x, panels, live, norm=norm),
    )


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "no features"])
def test_scores(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows = {"bfloat16": ROWS, "int8": ROWS, "no features": 9}[kind]  # kernels of their own
    if kind == "no features":
        monkeypatch.setattr(call, "host_features", frozenset)
    scores, values = (jax.jit(function) for function in kernels(kind))
    x = np.abs(np.random.default_rng(1).standard_normal((num_rows, NUM_IN), np.float32))
    for live in ([0, num_rows, num_rows, num_rows], [0, 2, 5, num_rows - 1], [0, 0, 4, 4]):
        edges = np.array(live, np.int32)
        rows = np.r_[live[0] : live[1], live[2] : live[3]]
        want = np.asarray(values(x, edges))[:, :COLUMNS].astype(np.float64)
        assert (want[rows] < 0).all()
        for wanted in (0, 1):
            got = scores(x, edges, np.array([wanted], np.int32))
            np.testing.assert_array_equal(np.asarray(got.best)[rows], want[rows].argmax(axis=1))
            np.testing.assert_array_equal(np.asarray(got.greatest)[rows], want[rows].max(axis=1))
            log_sum = np.log(np.exp(want[rows]).sum(axis=1))
            np.testing.assert_allclose(np.asarray(got.log_sum)[rows], log_sum, rtol=1e-6, atol=1e-6)
            assert (np.delete(np.asarray(got.best), rows) == 0).all()
        np.testing.assert_array_equal(np.asarray(got.values)[:, :COLUMNS], want)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_row_without_numbers_has_a_column_that_there_is(kind: str) -> None:
    x = np.full((ROWS, NUM_IN), np.nan, np.float32)
    scores = jax.jit(kernels(kind)[0])(x, np.array([0, ROWS, ROWS, ROWS], np.int32), np.array([0], np.int32))
    best = np.asarray(scores.best)
    assert ((best >= 0) & (best < COLUMNS)).all()
