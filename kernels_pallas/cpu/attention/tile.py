"""The register tile that both of attention's products are made of: C[rows, 64] += A[rows, 2 n] B[2 n, 64]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kernels_pallas.cpu.bf16 import I32S, LANES, dot_pairs, pair_everywhere
from kernels_pallas.cpu.ir import Function, Value, Variable

TILE_VECTORS = 4  # of C's columns
REGISTER_BYTES = 4 * LANES


def multiply(
    f: Function,
    sums: Sequence[Sequence[Variable]],
    a: Value,
    a_stride: int,
    b: Value,
    b_stride: int,
    num_pairs: Value | int,
    each_step: Callable[[Value], None] | None = None,
) -> None:
    """Adds the product to C's registers, for each row a list of <16 x float>.

    a: rows of bfloat16, `a_stride` bytes apart. b: for each pair of A's columns the pairs of numbers that they meet,
    one in each lane, `b_stride` bytes from one pair's registers to the next one's. each_step: writes more into the
    loop over pairs.
    """
    with f.loop(0, num_pairs) as k:
        if each_step is not None:
            each_step(k)
        a_k, b_k = a.at(k * 4), b.at(k * b_stride)
        columns = [b_k.at(REGISTER_BYTES * j).load(I32S, REGISTER_BYTES) for j in range(len(sums[0]))]
        for i, row in enumerate(sums):
            pair = pair_everywhere(f, a_k.at(i * a_stride))
            for total, column in zip(row, columns, strict=True):
                total.set(dot_pairs(f, total.get(), pair, column))
