"""Rotations by Hadamard matrices (Sylvester's) in blocks, which spread a row's outliers before it is rounded."""

from __future__ import annotations

from math import gcd
from typing import Any

import jax
import numpy as np

Array = np.ndarray[Any, Any]

_MAX_BLOCK = 64  # of 16 the log-probabilities' mean error is 0.067, see `quantize`


def block_size(size: int) -> int:
    """Of the blocks that an axis is rotated in: a power of 2."""
    return gcd(size, _MAX_BLOCK)


def rotated(x: jax.Array) -> jax.Array:
    """x [..., N] -> float32: each block of N times its size's Hadamard matrix, which twice over is times that size."""
    size = block_size(x.shape[-1])
    blocks = x.reshape(*x.shape[:-1], -1, size)
    turned = jax.lax.dot_general(
        blocks,
        _hadamard(size).astype(x.dtype),
        (((blocks.ndim - 1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == np.float32 else None,
        preferred_element_type=np.float32,
    )
    return turned.reshape(x.shape)


def rotated_weights(channels: Array, size: int) -> Array:
    """channels [C, N] float32, NumPy, in blocks of `size`: by the inverse of what `rotated` does to activations."""
    # A product a channel: as a single one it would go to as many threads as there are cores, and wait for them for
    # longer than it takes wherever the cores have other work.
    blocks: Array = channels.reshape(len(channels), -1, size) @ (_hadamard(size) / np.float32(size))
    return blocks.reshape(channels.shape)


def _hadamard(size: int) -> Array:
    """[size, size] of 1 and -1, symmetric, orthogonal but for a factor; size a power of 2."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
