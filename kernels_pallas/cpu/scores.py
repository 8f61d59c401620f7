"""What sampling wants of a product's rows, taken while their columns are in a cache: greatest, where, log-sum-exp.

An item knows some neighbouring columns of a row. It gives three numbers of them: the greatest, its first column, and
the sum of e**(value - greatest). All items' together are [groups of columns, rows] each; `merge_scores` makes one of
them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.cpu.bf16 import F32S, I32S, LANES, zeros
from kernels_pallas.cpu.ir import F32, I32, Function, Value
from kernels_pallas.cpu.vmath import LOG2_E, exp2, sum_lanes

# What an item gives: JAX's dtype, LLVM's, and what it is of a row that is dead.
PARTS = ((jnp.float32, F32, 0.0), (jnp.int32, I32, 0), (jnp.float32, F32, 1.0))
_NOWHERE = 2**31 - 1


class RowScores(NamedTuple):
    """Of R rows. values [R, columns] float32, if they were wanted. best [R] int32: the first of the greatest; greatest,
    log_sum [R] float32: of e**value. Of dead rows: 0, 0 and any number."""

    values: jax.Array
    best: jax.Array
    greatest: jax.Array
    log_sum: jax.Array


def score_columns(f: Function, at: Value, num_vectors: Value, first_column: Value) -> tuple[Value, Value, Value]:
    """16 neighbouring columns a vector, float32, from a pointer on -> greatest, its first column (i32), the sum."""
    greatest = f.variable(f.constant(-math.inf, F32S))
    with f.loop(0, num_vectors) as i:
        greatest.set(greatest.get().max(at.at(i * (4 * LANES)).load(F32S)))
    most = f.intrinsic(f"llvm.vector.reduce.fmax.v{LANES}f32", F32, greatest.get())
    everywhere = most.splat(LANES)
    total, where = f.variable(zeros(f)), f.variable(f.constant(_NOWHERE, I32S))
    columns = first_column.convert("trunc", I32).splat(LANES) + f.constants(range(LANES), I32)
    with f.loop(0, num_vectors) as i:
        value = at.at(i * (4 * LANES)).load(F32S)
        total.set(total.get() + exp2(f, (value - everywhere) * LOG2_E))
        here = columns + (i * LANES).convert("trunc", I32).splat(LANES)
        where.set(where.get().min(value.is_("==", everywhere).then(here, _NOWHERE)))
    first = f.intrinsic(f"llvm.vector.reduce.smin.v{LANES}i32", I32, where.get())
    return most, first, sum_lanes(total.get())


def merge_scores(
    values: jax.Array, greatest: jax.Array, columns: jax.Array, sums: jax.Array, num_columns: int
) -> RowScores:
    """Of all items: greatest, columns, sums [groups, R]. num_columns: that count; best is one of them whatever came."""
    most = greatest.max(axis=0)
    best = jnp.where(greatest == most, columns, _NOWHERE).min(axis=0)
    total = (sums * jnp.exp(greatest - most)).sum(axis=0)
    return RowScores(values, jnp.minimum(best, num_columns - 1), most, most + jnp.log(total))
