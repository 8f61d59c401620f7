"""Rotary embedding against complex numbers: component pair (i, i + D/2) is one number, turned by exp(i * angle)."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from fakes.checkpoints import TINY
from preble_jax.model.config import LinearRopeScaling, Llama3RopeScaling
from preble_jax.model.rope import inverse_frequencies, rotate, rotation_table

LLAMA3 = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)


@pytest.mark.parametrize("scaling", [None, LinearRopeScaling(factor=2.0), LLAMA3])
def test_halves_turn_as_complex_numbers(scaling):
    config = replace(TINY, rope_scaling=scaling)
    half, positions = config.head_dim // 2, np.array([0, 1, 2, 57, 99])
    table = rotation_table(config, 100)
    assert table.shape == (100, config.head_dim) and table.dtype == np.float32
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, len(positions), 3, 2, half)).astype(np.float32)

    turned = rotate(jnp.asarray(first), jnp.asarray(second), jnp.asarray(table)[positions], jnp.float32)

    angles = positions[:, None] * inverse_frequencies(config).astype(np.float64)
    expected = (first + 1j * second) * np.exp(1j * angles)[:, None, None, :]
    np.testing.assert_allclose(turned, np.concatenate([expected.real, expected.imag], -1), atol=2e-5)


def test_result_has_the_dtype_asked_for():
    half = jnp.ones((2, 1, 4), jnp.float32)
    assert rotate(half, half, jnp.ones((2, 8)), jnp.bfloat16).dtype == jnp.bfloat16
