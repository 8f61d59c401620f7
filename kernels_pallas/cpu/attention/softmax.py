"""Rows of scores to weights in bfloat16, with a running maximum and sum: the step between attention's two products."""

from __future__ import annotations

from kernels_pallas.cpu.bf16 import DOT_FEATURE, F32S, I32S, LANES, zeros
from kernels_pallas.cpu.ir import I32, Function, Value

NO_SCORE = -1e30  # a maximum before the first score; finite, so that differences are
# 2**x on [0, 1], highest power first: the best of its degree by relative error, 2.6e-06.
_EXP2 = (0.0135341677, 0.0520114609, 0.241442757, 0.693003835, 1.00000259)
_DOWN = 1 | 8  # of vreduceps: what is left when rounded down, no exception
_CURRENT = 4  # rounding mode
_LEAST = -126.0


def exp2_of_negative(f: Function, x: Value) -> Value:
    """2**x of <16 x float> that are not above 1; 0 where it is below float32's numbers, and of minus infinity."""
    scaled_by_power = {"avx512f", "avx512dq"} <= f.module.features
    if scaled_by_power:
        fraction = _masked(f, "reduce", x, f.constant(_DOWN, I32))
    else:
        whole = f.intrinsic("llvm.floor.v16f32", F32S, x)
        fraction = x - whole
    value = f.constant(_EXP2[0], F32S)
    for coefficient in _EXP2[1:]:
        value = f.fma(value, fraction, f.constant(coefficient, F32S))
    if scaled_by_power:
        return _masked(f, "scalef", value, x)
    power = whole.convert("fptosi", I32S) << 23
    return x.is_(">", _LEAST).then((value.bits_as(I32S) + power).bits_as(F32S), 0.0)


def _masked(f: Function, name: str, x: Value, y: Value) -> Value:
    """An instruction of AVX-512, on all lanes."""
    rest = zeros(f), f.constant(-1, "i16"), f.constant(_CURRENT, I32)
    return f.intrinsic(f"llvm.x86.avx512.mask.{name}.ps.512", F32S, x, y, *rest)


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
