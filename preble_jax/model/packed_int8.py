"""Int8 weights laid out for the CPU's own matrix products, scales among them: half the bytes of `packed`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.cpu.int8_matmul import HEADER_LINES, int8_matmul, int8_matmul_scores, pack_int8_panels
from kernels_pallas.cpu.scores import RowScores
from preble_jax.model.hadamard import block_size, rotated
from preble_jax.model.packed import PackedMatrix
from preble_jax.model.quantize import QuantizedMatrix


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("panels",),
    meta_fields=("num_in", "out_shape", "interleaved", "hadamard"),
)
@dataclass(frozen=True, kw_only=True)
class PackedInt8Matrix(PackedMatrix):
    """What `QuantizedMatrix` with int8 activations is, to the last bit of the integer sums; computed in bfloat16.

    panels: see `kernels_pallas.cpu.int8_matmul`. hadamard: size of the blocks that activations are rotated in.
    """

    hadamard: int

    def rows(self, indices: jax.Array) -> jax.Array:
        width = self.panels.shape[2]
        lines = self.panels[indices // width, :, indices % width]  # [T, 2 + in / 4, 4]
        scales = jax.lax.bitcast_convert_type(lines[:, 1], jnp.float32)
        rows = lines[:, HEADER_LINES:].reshape(len(indices), -1)[:, : self.num_in]
        return rotated(rows.astype(self._dtype)) * scales[:, None]

    @property
    def _dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = jnp.dtype(jnp.bfloat16)
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
        return int8_matmul(x, self.panels, live, hadamard=self.hadamard, norm=norm, residual=residual, swiglu=swiglu)

    def _scores(self, x: jax.Array, live: jax.Array, norm: tuple[jax.Array, float], wanted: jax.Array) -> RowScores:
        return int8_matmul_scores(
            x, self.panels, live, wanted, hadamard=self.hadamard, norm=norm, num_columns=self.out_shape[0]
        )


def pack_int8_matrix(matrix: QuantizedMatrix, *, interleaved: bool) -> PackedInt8Matrix:
    """On the host, NumPy arrays with int8 activations, as `quantize` makes them. interleaved: see `PackedMatrix`."""
    scales, values = np.asarray(matrix.scales), np.asarray(matrix.values)
    num_groups = scales.shape[0] if interleaved else 1
    num_in = values.size // scales.size
    panels = pack_int8_panels(values.reshape(num_groups, -1, num_in), scales.reshape(num_groups, -1))
    return PackedInt8Matrix(
        panels=cast(jax.Array, panels),
        num_in=num_in,
        out_shape=scales.shape,
        interleaved=interleaved,
        hadamard=block_size(values.shape[-1]),
    )
