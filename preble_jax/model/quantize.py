"""Weights in int8, one float32 scale an output channel: half the bytes of bfloat16, read at every step.

Two products, of which a matrix knows its own from the start, so that a token never depends on the batch around it:

- accelerators: weights converted to the compute dtype inside the product, which then reads half the bytes;
- the CPU, where XLA would write the converted weights to memory first: activations in int8 too, one scale a row of
  them, found anew at each step. The sums are then integers, exact in whatever order and on however many devices.

Activations have outliers, and a row's scale is that of its largest value. So on the CPU blocks of a row are first
multiplied by a Hadamard matrix, which spreads an outlier over its block, and the weights by its inverse when they are
quantised, which leaves the product what it was (QuaRot, arXiv 2404.00456, rotates so). On the default model it takes
the log-probabilities' mean error from 0.145 to 0.050, which is that of exact activations.

Scales leave the sum and multiply the result. Symmetric, to the nearest: no value is off by more than half its scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.cpu.int8_matmul import LARGEST, LEAST
from preble_jax.model.hadamard import block_size, rotated, rotated_weights
from preble_jax.model.packed import PackedMatrix

Array = np.ndarray[Any, Any]

WEIGHT_FORMATS = ("native", "int8")
"""What `model.weight_format` may be. native: matrices are kept in the engine's dtype."""

_CHUNK_VALUES = 1 << 18


@partial(jax.tree_util.register_dataclass, data_fields=("values", "scales"), meta_fields=("dtype", "int8_activations"))
@dataclass(frozen=True, kw_only=True)
class QuantizedMatrix:
    """A matrix, or an embedding, in int8.

    values: [out..., in...] int8: a channel's weights beside each other, which products on the CPU want (twice as fast
        at 8 rows as the other way round). scales: [out...] float32. dtype: what is computed in.
    int8_activations: by which of the two products; with them, the last axis of `values` is rotated.
    """

    values: jax.Array
    scales: jax.Array
    dtype: np.dtype[Any]
    int8_activations: bool

    def matmul(self, x: jax.Array) -> jax.Array:
        """[T, in...] @ itself -> [T, out...] float32."""
        x = x.astype(self.dtype)
        if not self.int8_activations:
            axes = (tuple(range(1, x.ndim)), tuple(range(self.scales.ndim, self.values.ndim)))
            return _dot(x, self.values.astype(self.dtype), axes) * self.scales
        rows, row_scales = _to_int8(rotated(x).reshape(len(x), -1))
        # A plain matrix, which costs nothing here: with more axes XLA would turn the weights around at every step.
        values = self.values.reshape(-1, rows.shape[1])
        sums = jax.lax.dot_general(rows, values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        product = sums.astype(jnp.float32) * row_scales * self.scales.reshape(-1)
        return product.reshape(len(x), *self.scales.shape)

    def rows(self, indices: jax.Array) -> jax.Array:
        """Rows of an embedding: indices [T] into its one output axis -> [T, in...] float32."""
        rows = self.values[indices]
        found = rotated(rows.astype(self.dtype)) if self.int8_activations else rows.astype(jnp.float32)
        return found * self.scales[indices].reshape(-1, *(1,) * (rows.ndim - 1))


Weight = jax.Array | QuantizedMatrix | PackedMatrix
"""A matrix as it is kept: in the compute dtype, in int8 with scales, or in either for the CPU's kernels."""


def quantize(matrix: Array, in_axes: Sequence[int], dtype: Any, *, int8_activations: bool) -> QuantizedMatrix:
    """On the host, NumPy arrays of a few channels at a time: beside the matrix and its int8 values there is next to
    nothing. `jax.device_put` puts what it makes, which is NumPy's too, where it is wanted.

    in_axes: those that a product sums over; each place along the others, the output's, has a scale of its own.
    dtype: what is computed in.
    """
    out_axes = [axis for axis in range(matrix.ndim) if axis not in in_axes]
    ordered = matrix.transpose(*out_axes, *in_axes)
    out_shape = ordered.shape[: len(out_axes)]
    channels = ordered.reshape(prod(out_shape), -1)  # a view of what readers make
    values, scales = np.empty(channels.shape, np.int8), np.empty(len(channels), np.float32)
    step = max(1, _CHUNK_VALUES // channels.shape[1])
    for first in range(0, len(channels), step):
        part = channels[first : first + step].astype(np.float32)
        if int8_activations:
            part = rotated_weights(part, block_size(ordered.shape[-1]))
        largest = np.abs(part).max(axis=1)
        part_scales = np.where(largest > 0, largest / np.float32(LARGEST), np.float32(1))
        values[first : first + step] = np.rint(part / part_scales[:, None])
        scales[first : first + step] = part_scales
    return QuantizedMatrix(
        values=cast(jax.Array, values.reshape(ordered.shape)),
        scales=cast(jax.Array, scales.reshape(out_shape)),
        dtype=jnp.dtype(dtype),
        int8_activations=int8_activations,
    )


def check_weight_format(weight_format: str) -> None:
    """Raises ValueError for one that does not exist."""
    if weight_format not in WEIGHT_FORMATS:
        raise ValueError(f"weight format: expected one of {', '.join(WEIGHT_FORMATS)}, got {weight_format!r}")


def has_int8_activations(platform: str) -> bool:
    """Which product a platform's matrices are made for."""
    return platform == "cpu"


def _to_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [T, N] float32 -> int8 and float32 scales [T, 1]; a row's largest magnitude becomes 127."""
    largest = jnp.maximum(jnp.max(jnp.abs(x), axis=1, keepdims=True), LEAST)
    return jnp.round(x * (LARGEST / largest)).astype(jnp.int8), largest * (1 / LARGEST)


def _dot(x: jax.Array, w: Any, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """float32 sums over these axes of both."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, w, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32)
