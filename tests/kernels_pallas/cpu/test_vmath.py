"""Functions of vectors, against NumPy in float64, on values over their whole range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.cpu import vmath
from kernels_pallas.cpu.bf16 import F32S, LANES
from kernels_pallas.cpu.call import call_kernel
from kernels_pallas.cpu.ir import Function, Value


@dataclass(frozen=True)
class Elementwise:
    """An item a register."""

    function: Callable[[Function, Value], Value]
    size: int
    name: str = "elementwise"
    num_args: int = 1
    num_results: int = 1

    def count_items(self, f: Function, buffers: list[Value]) -> Value:
        return f.int64(self.size // LANES)

    def write_item(self, f: Function, buffers: list[Value], item: Value) -> None:
        x, y = (buffer.at(item * (4 * LANES)) for buffer in buffers)
        y.store(self.function(f, x.load(F32S)))


def apply(function: Callable[[Function, Value], Value], x: np.ndarray) -> np.ndarray:
    (y,) = call_kernel(Elementwise(function, len(x)), [jnp.asarray(x)], [jax.ShapeDtypeStruct(x.shape, jnp.float32)])
    return np.asarray(y)


def test_exp2() -> None:
    x = np.linspace(-125, 127, 1 << 16, dtype=np.float32)
    np.testing.assert_allclose(apply(vmath.exp2, x), np.exp2(x.astype(np.float64)), rtol=2e-7)
    edges = np.array([0, -0.0, 1, -1, -126, -1e30, -np.inf, 128, 1e30, np.inf, *[0] * 6], np.float32)
    want = np.array([1, 1, 2, 0.5, 0, 0, 0, 2.0**127, 2.0**127, 2.0**127, *[1] * 6], np.float32)
    np.testing.assert_array_equal(apply(vmath.exp2, edges), want)


def test_sigmoid() -> None:
    x = np.linspace(-80, 80, 1 << 12, dtype=np.float32)
    np.testing.assert_allclose(apply(vmath.sigmoid, x), 1 / (1 + np.exp(-x.astype(np.float64))), rtol=5e-6)
    extremes = np.repeat(np.array([-np.inf, -1e30, 1e30, np.inf], np.float32), 4)
    np.testing.assert_allclose(apply(vmath.sigmoid, extremes), np.repeat([0, 0, 1, 1], 4), atol=1e-37)
