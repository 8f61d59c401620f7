"""Rows of scores to weights in bfloat16, with a running maximum and sum: the step between attention's two products."""

from __future__ import annotations

from kernels_pallas.cpu.bf16 import DOT_FEATURE, F32S, I32S, LANES
from kernels_pallas.cpu.ir import Function, Value

NO_SCORE = -1e30  # a maximum before the first score; finite, so that differences are
# 2**x on [-0.5, 0.5], highest power first: the best of its degree by relative error, 2.6e-6.
_EXP2 = (0.00957010179, 0.0559178603, 0.240247448, 0.693121815, 0.999999261)
_MAGIC = 1.5 * 2**23  # added to a number, rounds it to an integer and leaves that in the low bits
_LEAST = -126.0


def exp2_of_negative(f: Function, x: Value) -> Value:
    """2**x of <16 x float> that are not above 1; exactly 0 below -126, of minus infinity and of NaN."""
    shifted = x + _MAGIC
    fraction = x - (shifted - _MAGIC)
    value = f.constant(_EXP2[0], F32S)
    for coefficient in _EXP2[1:]:
        value = f.fma(value, fraction, f.constant(coefficient, F32S))
    scaled = value.bits_as(I32S) + (shifted.bits_as(I32S) << 23)
    return x.is_(">", _LEAST).then(scaled.bits_as(F32S), 0.0)


def larger(a: Value, b: Value) -> Value:
    """One instruction, unlike `Value.max`, which looks for NaN."""
    return a.is_(">", b).then(a, b)


def everywhere(x: Value, combine: str) -> Value:
    """The maximum or sum ("max", "sum") of 16 lanes, in all of them."""
    for distance in (8, 4, 2, 1):
        other = x.shuffle(x, [lane ^ distance for lane in range(LANES)])
        x = larger(x, other) if combine == "max" else x + other
    return x


def store_bfloat16(f: Function, target: Value, first: Value, second: Value) -> None:
    """32 finite numbers, rounded to nearest even."""
    if DOT_FEATURE in f.module.features:
        both = f.intrinsic("llvm.x86.avx512bf16.cvtne2ps2bf16.512", "<32 x bfloat>", second, first)
        target.store(both, 64)
        return
    for i, x in enumerate((first, second)):
        bits = x.bits_as(I32S)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        target.at(2 * LANES * i).store(rounded.convert("trunc", "<16 x i16>"), 32)
