"""Weights laid out for the CPU's own matrix products: as many bytes as before, read in the order they are wanted in.

Made when a matrix is read, and in memory only; checkpoints are written from the plain form.
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
from jax.sharding import Mesh

from kernels_pallas.cpu.embedding import embedding_rows
from kernels_pallas.cpu.matmul import matmul, matmul_scores, pack_panels
from kernels_pallas.cpu.scores import RowScores
from kernels_pallas.cpu.usable import has_byte_dots, has_wide_registers, usable

Array = np.ndarray[Any, Any]


@partial(jax.tree_util.register_dataclass, data_fields=("panels",), meta_fields=("num_in", "out_shape", "interleaved"))
@dataclass(frozen=True, kw_only=True)
class PackedMatrix:
    """A bfloat16 matrix, or an embedding, on one CPU.

    panels: see `kernels_pallas.cpu.matmul`. num_in: numbers that a product sums over. out_shape: of a row's result.
    interleaved: the first output axis has a gate and what it is for, which panels hold beside each other (SwiGLU).

    live [4] int32: the rows that are wanted; results of others are 0.
    """

    panels: jax.Array
    num_in: int
    out_shape: tuple[int, ...]
    interleaved: bool

    def matmul(self, x: jax.Array, live: jax.Array, norm: tuple[jax.Array, float] | None = None) -> jax.Array:
        """[T, in...] @ itself -> [T, out...] float32. norm: RMSNorm's weight and epsilon, for x in float32."""
        flat = self._flat(x) if norm is None else x
        return self._product(flat, live, norm=norm)[:, : prod(self.out_shape)].reshape(len(x), *self.out_shape)

    def matmul_added(self, x: jax.Array, residual: jax.Array, live: jax.Array) -> jax.Array:
        """residual [T, out] float32 + [T, in...] @ itself. Rows that are not live are the residual's."""
        return self._product(self._flat(x), live, residual=residual)[:, : residual.shape[1]]

    def swiglu(self, x: jax.Array, norm: tuple[jax.Array, float], live: jax.Array) -> jax.Array:
        """silu(gate) * up of the normed x [T, in] float32 -> [T, F] bfloat16."""
        return self._product(x, live, norm=norm, swiglu=True)[:, : self.out_shape[1]]

    def scores(self, x: jax.Array, live: jax.Array, norm: tuple[jax.Array, float], wanted: jax.Array) -> RowScores:
        """Of the normed x [T, in] float32 @ itself, which has one output axis. wanted []: whether the values are; else
        they mean nothing."""
        return self._scores(x, live, norm, wanted.astype(jnp.int32).reshape(1))

    def rows(self, indices: jax.Array) -> jax.Array:
        """Rows of an embedding: indices [T] into its one output axis -> [T, in] float32."""
        return embedding_rows(self.panels, indices)[:, : self.num_in]

    def _flat(self, x: jax.Array) -> jax.Array:
        return x.reshape(len(x), self.num_in).astype(self._dtype)

    @property
    def _dtype(self) -> np.dtype[Any]:
        """What is computed in."""
        dtype: np.dtype[Any] = self.panels.dtype
        return dtype

    def _product(
        self,
        x: jax.Array,
        live: jax.Array,
        *,
        norm: tuple[jax.Array, float] | None = None,
        residual: jax.Array | None = None,
        swiglu: bool = False,
    ) -> jax.Array:
        return matmul(x, self.panels, live, norm=norm, residual=residual, swiglu=swiglu)

    def _scores(self, x: jax.Array, live: jax.Array, norm: tuple[jax.Array, float], wanted: jax.Array) -> RowScores:
        return matmul_scores(x, self.panels, live, wanted, norm=norm, num_columns=self.out_shape[0])


def can_pack(dtype: Any, mesh: Mesh, weight_format: str = "native") -> bool:
    """Whether matrices in this dtype and format, on these devices, have kernels that are faster than XLA's products."""
    (device, *others) = mesh.devices.flat
    if device.platform != "cpu" or others or jnp.dtype(dtype) != jnp.bfloat16:
        return False
    return usable() and has_wide_registers() and (weight_format != "int8" or has_byte_dots())


def pack_matrix(matrix: Array, in_axes: Sequence[int], *, interleaved: bool) -> PackedMatrix:
    """On the host, NumPy arrays, next to nothing beside the matrix and its panels.

    in_axes: those that a product sums over. interleaved: see `PackedMatrix`; the output's axes are then [2, F].
    """
    out_axes = [axis for axis in range(matrix.ndim) if axis not in in_axes]
    out_shape = tuple(matrix.shape[axis] for axis in out_axes)
    num_in = matrix.size // prod(out_shape)
    num_groups = out_shape[0] if interleaved else 1
    columns = matrix.transpose(*out_axes, *in_axes).reshape(num_groups, -1, num_in)  # a view of what readers make
    return PackedMatrix(
        panels=cast(jax.Array, pack_panels(columns)), num_in=num_in, out_shape=out_shape, interleaved=interleaved
    )
