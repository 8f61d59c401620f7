"""Rounding to bfloat16 against the neighbours of a number: the nearer one, of two the even one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.cpu import call
from kernels_pallas.cpu.rounding import rounded


@pytest.mark.parametrize("features", ["host", "none"])
def test_rounding(features: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"host": 70, "none": 60}[features]  # kernels of their own
    if features == "none":
        monkeypatch.setattr(call, "host_features", frozenset)
    x = np.random.default_rng(0).standard_normal((rows, 3, 96)).astype(np.float32)
    x.view(np.uint32)[:9] &= 0xFFFF8000  # in the middle of two, or one of them
    below = (x.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)
    above = ((x.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32).astype(np.float64)
    is_even = (x.view(np.uint32) & 0x10000) == 0
    to_below, to_above = np.abs(x - below), np.abs(above - x)
    want = np.where((to_below < to_above) | ((to_below == to_above) & is_even), below, above)
    got = np.asarray(jax.jit(rounded)(x))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(np.float64), want)


def test_what_fills_no_register_is_rounded_too() -> None:
    assert rounded(jnp.ones((3, 5), jnp.float32)).dtype == jnp.bfloat16
