"""Parts of an attention put together in place, see `kernels_pallas.merge`."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels_pallas.cpu.attention.softmax import NO_SCORE, exp2_of_negative
from kernels_pallas.cpu.bf16 import F32S, LANES
from kernels_pallas.cpu.call import call_kernel
from kernels_pallas.cpu.ir import F32, I32, I64, Function, Value
from kernels_pallas.cpu.vmath import LOG2_E

_ITEM_TOKENS = 8


def merge_rows(
    own_out: jax.Array, own_lse: jax.Array, out: jax.Array, lse: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.merge.merge_rows`."""
    num_heads, head_dim = own_out.shape[1:]
    sizes = jnp.array([rows.shape[0], out.shape[0]], jnp.int32)
    kernel = MergeKernel(num_heads=num_heads, head_dim=head_dim, levels=rows.shape[1])
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (own_out, own_lse)]
    merged, merged_lse = call_kernel(kernel, (own_out, own_lse, out, lse, rows, sizes), results, aliases={0: 0, 1: 1})
    return merged, merged_lse


@dataclass(frozen=True, kw_only=True)
class MergeKernel:
    """levels: parts that a token can have beside its own."""

    num_heads: int
    head_dim: int
    levels: int

    name = "merge_rows"
    num_args = 6
    num_results = 2

    def count_items(self, f: Function, buffers: list[Value]) -> Value:
        return (_number(buffers[5]) + (_ITEM_TOKENS - 1)) // _ITEM_TOKENS

    def write_item(self, f: Function, buffers: list[Value], item: Value) -> None:
        """buffers: own out and lse, out, lse, rows, sizes; results, which are the first two."""
        _, _, out, lse, rows, sizes, own_out, own_lse = buffers
        num_tokens, num_rows = _number(sizes), _number(sizes.at(4))
        first = item * _ITEM_TOKENS
        with f.loop(first, (first + _ITEM_TOKENS).min(num_tokens)) as token:
            levels = [_number(rows.at((token * self.levels + level) * 4)) for level in range(self.levels)]
            exists = [row.is_("<", num_rows) for row in levels]
            some = exists[0]
            for one in exists[1:]:
                some = some | one
            with f.when(some), f.loop(0, self.num_heads) as head:
                place = token * self.num_heads + head
                # A part that does not exist weighs nothing, and is read where another one is.
                places = [one.then(row, 0) * self.num_heads + head for one, row in zip(exists, levels, strict=True)]
                parts = [own_lse.at(place * 4).load(F32)]
                for one, where in zip(exists, places, strict=True):
                    parts.append(one.then(lse.at(where * 4).load(F32), float("-inf")))
                pointers = [own_out.at(place * (4 * self.head_dim))]
                pointers += [out.at(where * (4 * self.head_dim)) for where in places]
                self._merge(f, pointers, parts, own_lse.at(place * 4))

    def _merge(self, f: Function, pointers: list[Value], lses: list[Value], lse: Value) -> None:
        """The first of the pointers and `lse` are written."""
        peak = f.constant(NO_SCORE, F32)
        for part in lses:
            peak = part.is_(">", peak).then(part, peak)
        weights = [exp2_of_negative(f, ((part - peak) * LOG2_E).splat(LANES)) for part in lses]
        total = weights[0]
        for weight in weights[1:]:
            total = total + weight
        inverse = total.is_(">", 0.0).then(f.constant(1.0, F32S) / total, 0.0)
        for first in range(0, self.head_dim, LANES):
            value = f.constant(0.0, F32S)
            for pointer, weight in zip(pointers, weights, strict=True):
                value = f.fma(pointer.at(4 * first).load(F32S), weight, value)
            pointers[0].at(4 * first).store(value * inverse)
        whole = peak + f.intrinsic("llvm.log.f32", F32, total.lane(0))
        lse.store(total.lane(0).is_(">", 0.0).then(whole, float("-inf")))


def _number(pointer: Value) -> Value:
    return pointer.load(I32).convert("sext", I64)
