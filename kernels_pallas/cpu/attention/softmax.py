"""Rows of scores to weights in bfloat16, with a running maximum and sum: the step between attention's two products."""

from __future__ import annotations

from collections.abc import Sequence

from kernels_pallas.cpu.bf16 import F32S, I32S, LANES, zeros
from kernels_pallas.cpu.ir import F32, I32, Function, Value

NO_SCORE = -1e30  # a maximum before the first score; finite, so that differences are
# The best polynomial of degree 4 for 2**x on [0, 1], divided by its highest coefficient, which Knuth's adaptation (The
# Art of Computer Programming 4.6.4) makes of two products: y = (x + a) x + b, (y + x + c) y + d. Additions and what
# finds the fraction run beside the products of bfloat16, multiplications in their place. Within 4.2e-6 of the value.
EXP2 = (1.42148721, 30.7383251, -47.0792656, 576.180359)
EXP2_SHIFT = -6.20725002  # binary logarithm of that coefficient
_DOWN = 1 | 8  # of vreduceps: what is left when rounded down, no exception
_CURRENT = 4  # rounding mode
_LEAST = -126.0


def exp2_shifted(f: Function, x: Value, coefficients: Sequence[Value] | None = None) -> Value:
    """2**(x - EXP2_SHIFT) of <16 x float> that are not above EXP2_SHIFT + 1; 0 where it is below float32's numbers, and
    of minus infinity. coefficients: EXP2, wherever they are."""
    a, b, c, d = coefficients or (f.constant(coefficient, F32S) for coefficient in EXP2)
    scaled_by_power = {"avx512f", "avx512dq"} <= f.module.features
    if scaled_by_power:
        fraction = _masked(f, "reduce", x, f.constant(_DOWN, I32))
    else:
        whole = f.intrinsic("llvm.floor.v16f32", F32S, x)
        fraction = x - whole
    y = f.fma(fraction + a, fraction, b)
    value = f.fma(y + (fraction + c), y, d)
    if scaled_by_power:
        return _masked(f, "scalef", value, x)
    power = whole.convert("fptosi", I32S) << 23
    return x.is_(">", _LEAST).then((value.bits_as(I32S) + power).bits_as(F32S), 0.0)


def exp2_of_negative(f: Function, x: Value) -> Value:
    """2**x of <16 x float> that are not above 1."""
    return exp2_shifted(f, x + EXP2_SHIFT)


class InMemory:
    """Numbers that are read where they are used, by the instruction that uses them: a loop whose registers are full
    keeps none of them in one."""

    def __init__(self, f: Function, numbers: Sequence[float]) -> None:
        self._function, self._size = f, len(numbers)
        room = f.stack(f"[{len(numbers)} x float]", 64)
        for i, number in enumerate(numbers):
            room.at(4 * i).store(f.constant(number, F32))
        self._pointer = f.hidden(room)

    def read(self) -> list[Value]:
        """Each in all lanes."""
        self._function.keep_order()
        return [self._pointer.at(4 * i).load(F32).splat(LANES) for i in range(self._size)]


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
