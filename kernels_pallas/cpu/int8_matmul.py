"""Matrix products with packed int8 weights: y = after(sums * row scale * column scale), integer sums, rows made here.

As in `matmul`, but an item makes its rows int8 first: normed where there is a norm, rounded to bfloat16, each block
times a Hadamard matrix (a fast Walsh-Hadamard transform, in registers), rounded to the nearest 127th of the row's
largest magnitude. `preble_jax.model.quantize` says why. One instruction multiplies 16 times 4 bytes, of which the
row's have no sign there: 128 is added to them, and sums begin at -128 times the sum of the column.

W [K, N] is packed in panels of 32 columns: [N / 32, 2 + K / 4, 32, 4] int8. Of a panel's lines [32, 4], the first is
where sums begin (int32), the second the scales (float32), the others have 4 neighbouring rows of W each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from kernels_pallas.cpu.bf16 import BF16_BITS, F32S, I32S, LANES, to_bf16
from kernels_pallas.cpu.ir import F32, I32, Function, Value
from kernels_pallas.cpu.matmul import (
    K_BYTES,
    LINE,
    PANEL,
    SCORED_PANELS,
    MatMul,
    run_kernel,
    run_scores_kernel,
    share_panels,
)
from kernels_pallas.cpu.scores import RowScores

VNNI_FEATURE = "avx512vnni"
LARGEST = 127  # of what is rounded: not -128, symmetric
LEAST = 1e-30  # a row's magnitude is taken for no less
HEADER_LINES = 2  # of a panel, before its weights
_MAX_HADAMARD = 64
_ZERO = 128  # what 0 is in a row
_MAGIC = 1.5 * 2**23  # added to a number, rounds it to an integer and leaves that in the low bits
_MOST_PANELS = 24
_MAKING_PANELS = 2  # what making an item's rows costs, in panels
_PANELS_AT_ONCE = 64

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Int8MatMul(MatMul):
    """hadamard: size of the blocks of a row that are transformed; a power of 2 up to 64. num_in: a multiple of 64."""

    hadamard: int = _MAX_HADAMARD
    name: str = "int8_matmul"

    @property
    def makes_rows(self) -> bool:
        return True

    @property
    def row_stride(self) -> int:
        return self.num_in + LINE  # a row's scale lies behind it

    @property
    def panel_bytes(self) -> int:
        return (HEADER_LINES + self.num_in // 4) * K_BYTES

    def make_rows(self, f: Function, x: Value, weight: Value | None, made: Value, num_rows: Value) -> None:
        rotated = f.stack(f"[{self.num_in} x float]", LINE)
        with f.loop(0, num_rows) as row:
            source, target = x.at(row * self.source_stride), made.at(row * self.row_stride)
            rms_scale = None if self.rms_eps is None else self.rms_scale(f, source)
            largest = f.variable(f.constant(0, I32S))  # magnitudes as bits, which are in the same order
            with f.loop(0, self.num_in, _MAX_HADAMARD) as k:
                block = []
                for j in range(0, _MAX_HADAMARD, LANES):
                    if rms_scale is None or weight is None:
                        bits = source.at((k + j) * 2).load(BF16_BITS)
                    else:
                        normed = source.at((k + j) * 4).load(F32S) * rms_scale * weight.at((k + j) * 4).load(F32S)
                        bits = to_bf16(f, normed)
                    block.append((bits.convert("zext", I32S) << 16).bits_as(F32S))
                for j, value in enumerate(_transformed(f, block, self.hadamard)):
                    rotated.at(k * 4 + j * LINE).store(value)
                    largest.set(largest.get().max(value.bits_as(I32S) & 0x7FFFFFFF))
            bits = f.intrinsic(f"llvm.vector.reduce.smax.v{LANES}i32", I32, largest.get())
            magnitude = bits.bits_as(F32).max(LEAST)
            target.at(self.num_in).store(magnitude * (1 / LARGEST))
            steps = (f.constant(LARGEST, F32) / magnitude).splat(LANES)
            with f.loop(0, self.num_in, LANES) as k:
                rounded = rotated.at(k * 4).load(F32S) * steps + (_MAGIC + _ZERO)
                target.at(k).store(rounded.bits_as(I32S).convert("trunc", f"<{LANES} x i8>"))

    def sums(self, f: Function, rows: int, x: Value, w: Value) -> list[list[Value]]:
        starts, scales = (
            [w.at(line * K_BYTES + j * LINE).load(type_, LINE) for j in range(2)]
            for line, type_ in enumerate((I32S, F32S))
        )
        sums = [[f.variable(start) for start in starts] for _ in range(rows)]
        weights = w.at(HEADER_LINES * K_BYTES)
        with f.loop(0, self.num_in // 4) as k:
            self.dots(f, sums, x.at(k * 4), weights.at(k * K_BYTES), dot_bytes)
        row_scales = [x.at(i * self.row_stride + self.num_in).load(F32).splat(LANES) for i in range(rows)]
        return [
            [total.get().convert("sitofp", F32S) * row_scale * scale for total, scale in zip(row, scales, strict=True)]
            for row, row_scale in zip(sums, row_scales, strict=True)
        ]


def int8_matmul(
    x: jax.Array,
    panels: jax.Array,
    live: jax.Array,
    *,
    hadamard: int,
    norm: tuple[jax.Array, float] | None = None,
    residual: jax.Array | None = None,
    swiglu: bool = False,
) -> jax.Array:
    """panels: of `pack_int8_panels`; hadamard: see `Int8MatMul`; the rest as in `matmul.matmul`."""
    num_panels, num_lines = panels.shape[:2]
    return run_kernel(
        Int8MatMul,
        x,
        panels,
        live,
        num_in=4 * (num_lines - HEADER_LINES),
        norm=norm,
        residual=residual,
        swiglu=swiglu,
        panels_per_item=share_panels(num_panels, most=_MOST_PANELS, overhead=_MAKING_PANELS),
        hadamard=hadamard,
    )


def int8_matmul_scores(
    x: jax.Array,
    panels: jax.Array,
    live: jax.Array,
    wanted: jax.Array,
    *,
    hadamard: int,
    norm: tuple[jax.Array, float],
    num_columns: int,
) -> RowScores:
    """panels: of `pack_int8_panels`; hadamard: see `Int8MatMul`; the rest as in `matmul.matmul_scores`."""
    num_panels, num_lines = panels.shape[:2]
    return run_scores_kernel(
        Int8MatMul,
        x,
        panels,
        live,
        wanted,
        num_in=4 * (num_lines - HEADER_LINES),
        norm=norm,
        num_columns=num_columns,
        panels_per_item=share_panels(num_panels, most=SCORED_PANELS, overhead=_MAKING_PANELS),
        hadamard=hadamard,
    )


def pack_int8_panels(columns: Array, scales: Array) -> Array:
    """columns [G, C, K] int8, scales [G, C] float32, NumPy, on the host -> [panels, 2 + K / 4, 32, 4] int8.

    A panel has 32 / G columns of each group. What is missing in the last one, and of K to a multiple of 64, is 0. A few
    panels at a time: beside the result there is next to nothing.
    """
    num_groups, num_columns, num_in = columns.shape
    width, wide_in = PANEL // num_groups, -(-num_in // _MAX_HADAMARD) * _MAX_HADAMARD
    panels = np.zeros((-(-num_columns // width), HEADER_LINES + wide_in // 4, PANEL), np.int32)
    for first in range(0, len(panels), _PANELS_AT_ONCE):
        here = slice(first * width, (first + _PANELS_AT_ONCE) * width)
        part, part_scales = columns[:, here], scales[:, here]
        num_panels = -(-part.shape[1] // width)
        wide = np.zeros((num_groups, num_panels * width, wide_in), np.int8)
        wide[:, : part.shape[1], :num_in] = part
        wide_scales = np.zeros(wide.shape[:2], np.float32)
        wide_scales[:, : part.shape[1]] = part_scales
        starts = -_ZERO * wide.sum(axis=2, dtype=np.int32)
        lines = np.concatenate(
            [starts[..., None], wide_scales.view(np.int32)[..., None], wide.view(np.int32)], axis=2, dtype=np.int32
        )
        by_panel = lines.reshape(num_groups, num_panels, width, -1).transpose(1, 3, 0, 2)
        panels[first : first + num_panels] = by_panel.reshape(num_panels, -1, PANEL)
    return panels.view(np.int8).reshape(*panels.shape, 4)


def dot_bytes(f: Function, acc: Value, a: Value, b: Value) -> Value:
    """acc [16] int32 + the sum over the four bytes in each lane of a * b; a without sign, b with; all <16 x i32>."""
    if VNNI_FEATURE in f.module.features:
        return f.intrinsic("llvm.x86.avx512.vpdpbusd.512", I32S, acc, a, b)
    for shift in range(0, 32, 8):
        signed = (((b >> shift) + 0x80) & 0xFF) - 0x80
        acc = acc + ((a >> shift) & 0xFF) * signed
    return acc


def _transformed(f: Function, block: list[Value], size: int) -> list[Value]:
    """64 numbers in 4 registers, each `size` neighbours times the Hadamard matrix of that size."""
    stride = 1
    while stride < min(size, LANES):
        signs = f.constants([-1.0 if lane & stride else 1.0 for lane in range(LANES)], F32)
        others = [lane ^ stride for lane in range(LANES)]
        block = [f.fma(value, signs, value.shuffle(value, others)) for value in block]
        stride *= 2
    while stride < size:
        apart = stride // LANES
        block = [block[i - apart] - value if i & apart else value + block[i + apart] for i, value in enumerate(block)]
        stride *= 2
    return block
