"""float32 rounded to bfloat16, on all threads and without asking every number whether it is one, as XLA does."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels_pallas.cpu.bf16 import F32S, LANES, to_bf16
from kernels_pallas.cpu.call import call_kernel
from kernels_pallas.cpu.ir import Function, Value

_ITEM_NUMBERS = 1 << 14


@dataclass(frozen=True)
class Rounded:
    """size: of the argument and of the result, a multiple of 16."""

    size: int
    name: str = "rounded"
    num_args: int = 1
    num_results: int = 1

    def count_items(self, f: Function, buffers: list[Value]) -> Value:
        return f.int64(-(-self.size // _ITEM_NUMBERS))

    def write_item(self, f: Function, buffers: list[Value], item: Value) -> None:
        x, y = buffers
        first = item * _ITEM_NUMBERS
        with f.loop(first, (first + _ITEM_NUMBERS).min(self.size), LANES) as i:
            y.at(i * 2).store(to_bf16(f, x.at(i * 4).load(F32S)))


def rounded(x: jax.Array) -> jax.Array:
    """x float32 -> bfloat16. A NaN may become a number."""
    if x.size % LANES:
        return x.astype(jnp.bfloat16)
    (y,) = call_kernel(Rounded(x.size), [x], [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)])
    return y
