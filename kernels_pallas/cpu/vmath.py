"""Functions of vectors of float32 that processors have no instruction for."""

from __future__ import annotations

from kernels_pallas.cpu.ir import Function, Value, lanes, vector

LOG2_E = 1.4426950408889634

# 2**x on [-0.5, 0.5], highest power first: the best of its degree (Remez), 2e-9 of the value off; 1 at 0.
_EXP2 = (
    0.00015345812009531215,
    0.0013399931219213652,
    0.009618488957087473,
    0.05550328776965098,
    0.24022646890634428,
    0.6931472057372678,
    1.0,
)
_MAGIC = 1.5 * 2**23  # added to a number, rounds it to an integer and leaves that in the low bits
_LEAST, _MOST = -125.0, 127.0


def exp2(f: Function, x: Value) -> Value:
    """2**x, of a vector of float32, no more than 2e-7 of the value off; 1 at 0.

    Exactly 0 below -125 (minus infinity too), and that of 127 above it; a NaN gives 0 or a finite number.
    """
    within = x.max(_LEAST).min(_MOST)
    shifted = within + _MAGIC
    fraction = within - (shifted - _MAGIC)
    value = f.constant(_EXP2[0], x.type)
    for coefficient in _EXP2[1:]:
        value = f.fma(value, fraction, f.constant(coefficient, x.type))
    integers = vector(lanes(x.type), "i32")
    scaled = value.bits_as(integers) + (shifted.bits_as(integers) << 23)
    return x.is_(">=", _LEAST).then(scaled.bits_as(x.type), 0.0)


def sigmoid(f: Function, x: Value) -> Value:
    """1 / (1 + e**-x), of a vector of float32."""
    one = f.constant(1.0, x.type)
    return one / (one + exp2(f, x * -LOG2_E))
