"""Rows of an embedding out of the panels that it lies in as an output matrix: see `matmul.pack_panels`."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels_pallas.cpu.call import call_kernel
from kernels_pallas.cpu.ir import I32, I64, Function, Value

_ITEM_ROWS = 16
_PANEL, _PAIR_BYTES = 32, 4


@dataclass(frozen=True)
class EmbeddingRows:
    """num_rows: that are wanted. num_pairs: of a row's numbers.

    Arguments: the panels, the rows' numbers. Result: [rows, 2 * pairs] float32.
    """

    num_rows: int
    num_pairs: int
    num_panels: int
    name: str = "embedding"
    num_args: int = 2
    num_results: int = 1

    def count_items(self, f: Function, buffers: list[Value]) -> Value:
        return f.int64(-(-self.num_rows // _ITEM_ROWS))

    def write_item(self, f: Function, buffers: list[Value], item: Value) -> None:
        panels, indices, y = buffers
        first = item * _ITEM_ROWS
        with f.loop(first, (first + _ITEM_ROWS).min(self.num_rows)) as row:
            index = indices.at(row * 4).load(I32).convert("sext", I64).max(0).min(self.num_panels * _PANEL - 1)
            line = _PANEL * _PAIR_BYTES
            source = panels.at(index // _PANEL * (self.num_pairs * line) + index % _PANEL * _PAIR_BYTES)
            target = y.at(row * (8 * self.num_pairs))
            with f.loop(0, self.num_pairs) as pair:
                bits = source.at(pair * line).load(I32)
                target.at(pair * 8).store(bits << 16)
                target.at(pair * 8 + 4).store(bits & 0xFFFF0000)


def embedding_rows(panels: jax.Array, indices: jax.Array) -> jax.Array:
    """panels [panels, K / 2, 32, 2] bfloat16; indices [T] int32 -> [T, K] float32.

    An index outside is taken for the nearest inside.
    """
    num_panels, num_pairs = panels.shape[:2]
    kernel = EmbeddingRows(len(indices), num_pairs, num_panels)
    (rows,) = call_kernel(kernel, [panels, indices], [jax.ShapeDtypeStruct((len(indices), 2 * num_pairs), jnp.float32)])
    return rows
