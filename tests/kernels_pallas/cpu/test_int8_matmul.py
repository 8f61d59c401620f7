"""Products with packed int8 weights against NumPy: where transforms are exact, so are the integers, to the last bit."""

from __future__ import annotations

from math import gcd

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.cpu import call
from kernels_pallas.cpu.int8_matmul import int8_matmul, pack_int8_panels

EPS = 1e-5


def weights(groups: int, columns: int, num_in: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(columns)
    values = random.integers(-127, 128, (groups, columns, num_in)).astype(np.int8)
    return values, random.uniform(0.5, 2.0, (groups, columns)).astype(np.float32)


def whole_numbers(rows: int, num_in: int) -> np.ndarray:
    """Sums of these are exact in float32, whatever their order. With a row of zeros, and an outlier."""
    x = np.random.default_rng(rows).integers(-9, 10, (rows, num_in)).astype(np.float32)
    x[1], x[3, num_in // 2] = 0, 640
    return x


def transformed(x: np.ndarray, size: int) -> np.ndarray:
    hadamard = np.ones((1, 1), np.float32)
    while len(hadamard) < size:
        hadamard = np.kron(np.array([[1, 1], [1, -1]], np.float32), hadamard)
    return (x.reshape(len(x), -1, size) @ hadamard).reshape(x.shape)


def product(x: np.ndarray, values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """x [M, K] float32, transformed; values [N, K]; scales [N]."""
    largest = np.maximum(np.abs(x).max(axis=1, keepdims=True), np.float32(1e-30))
    rounded = np.rint(x * (np.float32(127) / largest)).astype(np.int64)
    sums = (rounded @ values.T.astype(np.int64)).astype(np.float32)
    return sums * (largest * np.float32(1 / 127)) * scales


@pytest.mark.parametrize(
    ("num_in", "rows", "features"),
    [(192, 29, "host"), (96, 30, "host"), (16, 31, "host"), (45, 32, "host"), (1536, 250, "host"), (96, 13, "none")],
)
def test_integers_are_exact(num_in: int, rows: int, features: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole panels and parts of one, every size of block, several items' worth of rows; a residual is added."""
    if features == "none":
        monkeypatch.setattr(call, "host_features", frozenset)
    values, scales = weights(1, 70, num_in)
    x, size, live = whole_numbers(rows, num_in), gcd(num_in, 64), [0, rows // 2, rows // 2 + 2, rows - 1]
    want = product(transformed(x, size), values[0], scales[0])
    panels, edges = pack_int8_panels(values, scales), np.array(live, np.int32)
    dead = np.ones(rows, bool)
    dead[: live[1]] = dead[live[2] : live[3]] = False
    want[dead] = 0
    given = np.where(dead[:, None], np.nan, x).astype(jnp.bfloat16)
    got = jax.jit(lambda x: int8_matmul(x, panels, edges, hadamard=size))(given)
    np.testing.assert_array_equal(np.asarray(got)[:, :70], want)
    residual = np.random.default_rng(0).standard_normal((rows, 70)).astype(np.float32)
    added = jax.jit(lambda x, residual: int8_matmul(x, panels, edges, hadamard=size, residual=residual))
    np.testing.assert_array_equal(np.asarray(added(given, residual))[:, :70], residual + want)


def test_norm_and_swiglu() -> None:
    values, scales = weights(2, 24, 192)
    scales /= 2000
    random = np.random.default_rng(0)
    x, weight = random.standard_normal((31, 192)).astype(np.float32), random.standard_normal(192).astype(np.float32)
    normed = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPS) * weight
    rotated = transformed(normed.astype(jnp.bfloat16).astype(np.float32), 64)
    gate, up = (product(rotated, *half) for half in zip(values, scales, strict=True))
    live = np.array([0, 31, 31, 31], np.int32)

    def behind_norm(columns: tuple[np.ndarray, np.ndarray], swiglu: bool) -> np.ndarray:
        panels = pack_int8_panels(*columns)
        y = jax.jit(lambda x: int8_matmul(x, panels, live, hadamard=64, norm=(weight, EPS), swiglu=swiglu))(x)
        return np.asarray(y, np.float64)[:, :24]

    # A few activations, or integers, are rounded to the other side.
    np.testing.assert_allclose(behind_norm((values[:1], scales[:1]), False), gate, atol=2e-3 * np.abs(gate).max())
    want = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(behind_norm((values, scales), True), want, atol=1e-2 * np.abs(want).max())
