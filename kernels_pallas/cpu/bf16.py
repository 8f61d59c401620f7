"""Products of bfloat16 pairs, the instruction everything here is built on, for processors with and without it."""

from __future__ import annotations

from kernels_pallas.cpu.ir import Function, Value

LANES = 16  # of a register of float32
F32S, I32S, BF16S = f"<{LANES} x float>", f"<{LANES} x i32>", f"<{2 * LANES} x bfloat>"
BF16_BITS = f"<{LANES} x i16>"
DOT_FEATURE = "avx512bf16"


def zeros(f: Function) -> Value:
    return f.constant(0.0, F32S)


def pair_everywhere(f: Function, pointer: Value) -> Value:
    """Two neighbouring bfloat16, as bits, in every lane: <16 x i32>."""
    return pointer.load("i32", 2).splat(LANES)


def dot_pairs(f: Function, acc: Value, a: Value, b: Value) -> Value:
    """acc [16] float32 + the sum over the two bfloat16 in each lane of a * b; a, b <16 x i32> as bits."""
    if DOT_FEATURE in f.module.features:
        return f.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", F32S, acc, a.bits_as(BF16S), b.bits_as(BF16S))
    a_even, a_odd, b_even, b_odd = (*_widen(a), *_widen(b))
    return f.fma(a_odd, b_odd, f.fma(a_even, b_even, acc))


def to_bf16(f: Function, x: Value) -> Value:
    """x [16] float32 -> bfloat16 as bits, <16 x i16>: the nearest, of two the even one. A NaN may become a number."""
    if DOT_FEATURE in f.module.features:
        rounded = f.intrinsic("llvm.x86.avx512bf16.cvtneps2bf16.512", f"<{LANES} x bfloat>", x)
        return rounded.bits_as(BF16_BITS)
    bits = x.bits_as(I32S)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).convert("trunc", BF16_BITS)


def _widen(pairs: Value) -> tuple[Value, Value]:
    return (pairs << 16).bits_as(F32S), (pairs & 0xFFFF0000).bits_as(F32S)
