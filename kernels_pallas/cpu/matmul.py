"""Matrix products with packed weights, and what goes before and after them: y = after(before(x) @ W).

W [K, N] is packed in panels of 32 columns, each with K neighbouring pairs of rows beside each other: [N / 32, K / 2,
32, 2] bfloat16. A register tile is up to 12 rows by one panel: 24 sums, and two registers of weights that every row
uses. A panel stays in the first cache while a block's rows go past it; few rows read it once, from memory.

An item is a block of rows and a few panels. It first makes its block's rows what the dots want, where they are not.

Only rows that are alive cost (`live`). All other rows of the result are 0, or as they were where a residual is added.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.cpu.bf16 import BF16_BITS, F32S, I32S, LANES, dot_pairs, pair_everywhere, to_bf16, zeros
from kernels_pallas.cpu.call import call_kernel
from kernels_pallas.cpu.ir import F32, I1, I32, Function, Value, Variable
from kernels_pallas.cpu.live import count_live, dead_runs, each_run
from kernels_pallas.cpu.scores import PARTS, RowScores, merge_scores, score_columns
from kernels_pallas.cpu.vmath import sigmoid, sum_lanes

PANEL = 2 * LANES  # columns
_TILE_ROWS = 12
_MAX_BLOCK_ROWS = 10 * _TILE_ROWS
_BLOCK_BYTES = 1 << 19  # of rows that an item makes for itself: half of a second-level cache
_PAIR_BYTES = 4
K_BYTES = PANEL * _PAIR_BYTES  # of a panel, for each pair of rows
LINE = 64
_AHEAD = 128 * LINE  # how far in front of the dots weights are asked for
_PANELS_AT_ONCE = 64
_MADE_PANELS = 24  # an item's at most, whose rows it makes
SCORED_PANELS = 24  # an item's at most, whose results are kept until they are scored

Array = np.ndarray[Any, Any]

Epilogue = Literal["none", "add", "swiglu", "scores"]
Dot = Callable[[Function, Value, Value, Value], Value]
"""(f, sums, 4 bytes of a row in each lane, 4 bytes of a column in each lane) -> sums."""


@dataclass(frozen=True)
class MatMul:
    """num_rows: of x. num_in: K, a multiple of 16. num_panels: of W.

    rms_eps: None: x is bfloat16. Otherwise x is float32, and every row is first divided by its root mean square and
        multiplied by a weight [K] float32 (RMSNorm). num_normed: numbers in the mean; columns behind them are 0.
    epilogue: none: float32 [M, N]. add: float32, and what is added to is an argument whose memory the result may take.
        swiglu: a panel holds 16 columns of the gate and 16 of what is gated; silu(gate) * up, bfloat16 [M, N / 2].
        scores: as none, but only written where an argument [1] int32 is not 0; and three results more, of `scores`,
        each [items of a block, M].
    num_columns: of W that count for scores; those behind them are -inf.

    Arguments: x, W, live, then the norm's weight, then the residual or whether results are wanted.
    """

    num_rows: int
    num_in: int
    num_panels: int
    epilogue: Epilogue = "none"
    rms_eps: float | None = None
    num_normed: int = 0
    num_columns: int = 0
    panels_per_item: int = 1
    name: str = "matmul"

    @property
    def num_args(self) -> int:
        return 3 + (self.rms_eps is not None) + (self.epilogue in ("add", "scores"))

    @property
    def num_results(self) -> int:
        return 1 + len(PARTS) if self.epilogue == "scores" else 1

    @property
    def makes_rows(self) -> bool:
        """Whether what the dots read is made by each item for itself."""
        return self.rms_eps is not None

    @property
    def source_stride(self) -> int:
        """Bytes from one row of x to the next."""
        return 2 * self.num_in if self.rms_eps is None else 4 * self.num_in

    @property
    def row_stride(self) -> int:
        """Bytes from one row to the next, as the dots read them."""
        # Rows that an item makes are kept from starting at equal places of the first cache.
        return 2 * self.num_in + (LINE if self.makes_rows else 0)

    @property
    def panel_bytes(self) -> int:
        return self.num_in // 2 * K_BYTES

    @property
    def _block_rows(self) -> int:
        rows = min(_MAX_BLOCK_ROWS, _BLOCK_BYTES // self.row_stride) if self.makes_rows else _MAX_BLOCK_ROWS
        return max(rows // _TILE_ROWS, 1) * _TILE_ROWS

    @property
    def num_groups(self) -> int:
        """Items of a block of rows."""
        return -(-self.num_panels // self.panels_per_item)

    @property
    def _y_panel_bytes(self) -> int:
        """Of a row."""
        return 2 * LANES if self.epilogue == "swiglu" else 4 * PANEL

    @property
    def _y_stride(self) -> int:
        """Bytes from one row of the result to the next."""
        return self.num_panels * self._y_panel_bytes

    @property
    def _tile_stride(self) -> int:
        """Bytes from one row to the next, as tiles write them."""
        return self.panels_per_item * self._y_panel_bytes + LINE if self.epilogue == "scores" else self._y_stride

    def count_items(self, f: Function, buffers: list[Value]) -> Value:
        return self._num_blocks(count_live(buffers[2])) * self.num_groups

    def _num_blocks(self, num_live: Value) -> Value:
        return ((num_live + (self._block_rows - 1)) // self._block_rows).max(1)

    def write_item(self, f: Function, buffers: list[Value], item: Value) -> None:
        (x, panels, live, *more), (y, *parts) = buffers[: self.num_args], buffers[self.num_args :]
        num_live = count_live(live)
        num_blocks = self._num_blocks(num_live)
        # Blocks of one size, a whole number of tiles.
        rows_per_block = ((num_live + (num_blocks * _TILE_ROWS - 1)) // (num_blocks * _TILE_ROWS)) * _TILE_ROWS
        block, group = item // self.num_groups, item % self.num_groups
        first = block * rows_per_block
        last = (first + rows_per_block).min(num_live)
        begin_panel = group * self.panels_per_item
        end_panel = (begin_panel + self.panels_per_item).min(self.num_panels)
        wanted = more[-1].load(I32).is_("!=", 0) if self.epilogue == "scores" else f.constant(True, I1)
        parts = [part.at(group * (4 * self.num_rows)) for part in parts]
        if self.epilogue != "add":
            with f.when(block.is_("==", 0)):
                if parts:
                    self._clear_dead_parts(f, live, parts)
                with f.when(wanted):
                    self._clear_dead(f, live, y, begin_panel, end_panel)
        made = None
        if self.makes_rows:
            made = f.stack(f"[{self._block_rows * self.row_stride} x i8]", LINE)
            weight = None if self.rms_eps is None else more[0]
            with each_run(f, live, first, last) as (begin, end, row):
                target = made.at((begin - first) * self.row_stride)
                self.make_rows(f, x.at(row * self.source_stride), weight, target, end - begin)
        scored = f.stack(f"[{self._block_rows * self._tile_stride} x i8]", LINE) if self.epilogue == "scores" else None
        with f.loop(begin_panel, end_panel) as panel, each_run(f, live, first, last) as (begin, end, row):
            w = panels.at(panel * self.panel_bytes)
            source = x.at(row * self.row_stride) if made is None else made.at((begin - first) * self.row_stride)
            target = y.at(row * self._y_stride + panel * self._y_panel_bytes)
            if scored is not None:
                target = scored.at((begin - first) * self._tile_stride + (panel - begin_panel) * self._y_panel_bytes)
            residual = None
            if self.epilogue == "add":
                residual = more[-1].at(row * self._y_stride + panel * self._y_panel_bytes)
            self._rows(f, source, w, target, residual, end - begin)
        if scored is not None:
            with each_run(f, live, first, last) as (begin, end, row), f.loop(begin, end) as i:
                now, here = row + (i - begin), scored.at((i - first) * self._tile_stride)
                self._score(f, here, begin_panel, end_panel, [part.at(now * 4) for part in parts])
                with f.when(wanted), f.loop(begin_panel, end_panel) as panel:
                    source, target = (
                        here.at((panel - begin_panel) * (4 * PANEL)),
                        y.at(now * self._y_stride + panel * (4 * PANEL)),
                    )
                    for offset in (0, LINE):
                        target.at(offset).store(source.at(offset).load(F32S))

    # -- rows --------------------------------------------------------------------------------------

    def _rows(self, f: Function, x: Value, w: Value, y: Value, residual: Value | None, num_rows: Value) -> None:
        """One panel, neighbouring rows: tiles of 12, and the last two as equal as they can be."""
        done = f.variable(f.int64(0))
        with f.repeat() as again:
            row = done.get()
            left = num_rows - row
            again.stop_if(left.is_("<=", 0))
            halves = left.is_(">", _TILE_ROWS).then((left + 1) >> 1, left)
            size = left.is_(">=", 2 * _TILE_ROWS).then(_TILE_ROWS, halves)
            places = [x.at(row * self.row_stride), w, y.at(row * self._tile_stride)]
            if residual is not None:
                places.append(residual.at(row * self._y_stride))
            for rows in range(1, _TILE_ROWS + 1):
                with f.when(size.is_("==", rows)):
                    self._tile(f, rows, places)
            done.set(row + size)

    def _tile(self, f: Function, rows: int, places: list[Value]) -> None:
        x, w, y, *residual = places
        sums = self.sums(f, rows, x, w)
        for i in range(rows):
            low, high = sums[i]
            at = y.at(i * self._tile_stride)
            if self.epilogue == "swiglu":
                at.store(to_bf16(f, low * sigmoid(f, low) * high))
                continue
            for j, value in enumerate((low, high)):
                if residual:
                    value = value + residual[0].at(i * self._y_stride + j * LINE).load(F32S)
                at.at(j * LINE).store(value)

    def sums(self, f: Function, rows: int, x: Value, w: Value) -> list[list[Value]]:
        """[rows][2] of 16 float32: a tile's products."""
        sums = [[f.variable(zeros(f)) for _ in range(2)] for _ in range(rows)]
        with f.loop(0, self.num_in // 2) as k:
            self.dots(f, sums, x.at(k * _PAIR_BYTES), w.at(k * K_BYTES), dot_pairs)
        return [[total.get() for total in row] for row in sums]

    def dots(self, f: Function, sums: list[list[Variable]], x: Value, w: Value, dot: Dot) -> None:
        """The next 4 bytes of every row times a line and another of the panel."""
        columns = [w.at(LINE * j).load(I32S, LINE) for j in range(2)]
        for j in range(2):
            w.at(_AHEAD + LINE * j).prefetch()
        for i, row in enumerate(sums):
            values = pair_everywhere(f, x.at(i * self.row_stride))
            for j in range(2):
                row[j].set(dot(f, row[j].get(), values, columns[j]))

    # -- before -------------------------------------------------------------------------------------

    def make_rows(self, f: Function, x: Value, weight: Value | None, made: Value, num_rows: Value) -> None:
        """x: the rows given; made: where the dots will read them."""
        assert weight is not None
        with f.loop(0, num_rows) as row:
            source, target = x.at(row * self.source_stride), made.at(row * self.row_stride)
            scale = self.rms_scale(f, source)
            with f.loop(0, self.num_in, LANES) as k:
                value = source.at(k * 4).load(F32S) * scale * weight.at(k * 4).load(F32S)
                target.at(k * 2).store(to_bf16(f, value))

    def rms_scale(self, f: Function, source: Value) -> Value:
        """1 / a row's root mean square, in all lanes."""
        assert self.rms_eps is not None
        squares = [f.variable(zeros(f)) for _ in range(_chains(self.num_in))]
        with f.loop(0, self.num_in, LANES * len(squares)) as k:
            for j, square in enumerate(squares):
                value = source.at(k * 4 + j * LINE).load(F32S)
                square.set(f.fma(value, value, square.get()))
        total = sum((square.get() for square in squares[1:]), squares[0].get())
        mean = sum_lanes(total) * (1 / self.num_normed)
        return (f.constant(1.0, F32) / f.intrinsic("llvm.sqrt.f32", F32, mean + self.rms_eps)).splat(LANES)

    # -- behind and beside --------------------------------------------------------------------------

    def _score(self, f: Function, row: Value, begin_panel: Value, end_panel: Value, parts: list[Value]) -> None:
        """row: an item's columns of one. parts: where what is found goes."""
        if missing := self.num_panels * PANEL - self.num_columns:
            with f.when(end_panel.is_("==", self.num_panels)):
                last = row.at((end_panel - begin_panel) * (4 * PANEL))
                for column in range(1, missing + 1):
                    last.at(-4 * column).store(f.constant(-math.inf, F32))
        num_vectors = (end_panel - begin_panel) * (PANEL // LANES)
        for part, value in zip(parts, score_columns(f, row, num_vectors, begin_panel * PANEL), strict=True):
            part.store(value)

    def _clear_dead_parts(self, f: Function, live: Value, parts: list[Value]) -> None:
        for begin, end in dead_runs(f, live, self.num_rows):
            with f.loop(begin, end) as row:
                for part, (_, type_, value) in zip(parts, PARTS, strict=True):
                    part.at(row * 4).store(f.constant(value, type_))

    def _clear_dead(self, f: Function, live: Value, y: Value, begin_panel: Value, end_panel: Value) -> None:
        for begin, end in dead_runs(f, live, self.num_rows):
            with f.loop(begin, end) as row, f.loop(begin_panel, end_panel) as panel:
                at = y.at(row * self._y_stride + panel * self._y_panel_bytes)
                for offset in range(0, self._y_panel_bytes, 2 * LANES):
                    at.at(offset).store(f.constant(0, BF16_BITS))


def matmul(
    x: jax.Array,
    panels: jax.Array,
    live: jax.Array,
    *,
    norm: tuple[jax.Array, float] | None = None,
    residual: jax.Array | None = None,
    swiglu: bool = False,
) -> jax.Array:
    """x [M, K] bfloat16, or with a norm (weight [K] float32, eps) float32; panels: of `pack_panels`; live [4] int32.

    residual [M, N] float32 is added, swiglu is applied, or neither: see `MatMul`. Returns [M, N] float32, with swiglu
    [M, N / 2] bfloat16, columns that fill up the last panel included.
    """
    num_rows = len(x)
    num_panels, num_pairs = panels.shape[:2]
    return run_kernel(
        MatMul,
        x,
        panels,
        live,
        num_in=2 * num_pairs,
        norm=norm,
        residual=residual,
        swiglu=swiglu,
        panels_per_item=_panels_per_item(num_rows, num_panels, normed=norm is not None),
    )


def matmul_scores(
    x: jax.Array,
    panels: jax.Array,
    live: jax.Array,
    wanted: jax.Array,
    *,
    norm: tuple[jax.Array, float],
    num_columns: int,
) -> RowScores:
    """x [M, K] float32, norm, panels and live: as in `matmul`. num_columns: of W, without what fills up the last panel.

    wanted [1] int32: whether the values are, [M, N] float32, of which only the first num_columns mean anything; where
    it is 0, none does, and their memory is not touched.
    """
    num_panels, num_pairs = panels.shape[:2]
    return run_scores_kernel(
        MatMul,
        x,
        panels,
        live,
        wanted,
        num_in=2 * num_pairs,
        norm=norm,
        num_columns=num_columns,
        panels_per_item=share_panels(num_panels, most=SCORED_PANELS),
    )


def run_kernel(
    kind: Callable[..., MatMul],
    x: jax.Array,
    panels: jax.Array,
    live: jax.Array,
    *,
    num_in: int,
    norm: tuple[jax.Array, float] | None,
    residual: jax.Array | None,
    swiglu: bool,
    **settings: int,
) -> jax.Array:
    """A kind of `MatMul`, with settings of its own, on arguments as `matmul` has them."""
    num_rows, num_panels = len(x), len(panels)
    args = _arguments(x, panels, live, num_in, norm)
    epilogue: Epilogue = "swiglu" if swiglu else "none"
    aliases = None
    if residual is not None:
        epilogue, aliases = "add", {len(args): 0}
        args.append(_wide(residual, num_panels * PANEL))
    kernel = _kernel(kind, x, panels, num_in, norm, epilogue=epilogue, **settings)
    columns, dtype = (LANES, jnp.bfloat16) if swiglu else (PANEL, jnp.float32)
    (y,) = call_kernel(kernel, args, [jax.ShapeDtypeStruct((num_rows, num_panels * columns), dtype)], aliases=aliases)
    return y


def run_scores_kernel(
    kind: Callable[..., MatMul],
    x: jax.Array,
    panels: jax.Array,
    live: jax.Array,
    wanted: jax.Array,
    *,
    num_in: int,
    norm: tuple[jax.Array, float],
    **settings: int,
) -> RowScores:
    """A kind of `MatMul`, with settings of its own, on arguments as `matmul_scores` has them."""
    num_rows, num_panels = len(x), len(panels)
    kernel = _kernel(kind, x, panels, num_in, norm, epilogue="scores", **settings)
    y = jax.ShapeDtypeStruct((num_rows, num_panels * PANEL), jnp.float32)
    parts = [jax.ShapeDtypeStruct((kernel.num_groups, num_rows), dtype) for dtype, _, _ in PARTS]
    args = [*_arguments(x, panels, live, num_in, norm), wanted]
    values, greatest, columns, sums = call_kernel(kernel, args, [y, *parts])
    return merge_scores(values, greatest, columns, sums, kernel.num_columns)


def _kernel(
    kind: Callable[..., MatMul],
    x: jax.Array,
    panels: jax.Array,
    num_in: int,
    norm: tuple[jax.Array, float] | None,
    **settings: Any,
) -> MatMul:
    num_rows, num_normed = x.shape
    eps = None if norm is None else norm[1]
    return kind(
        num_rows=num_rows, num_in=num_in, num_panels=len(panels), rms_eps=eps, num_normed=num_normed, **settings
    )


def _arguments(
    x: jax.Array, panels: jax.Array, live: jax.Array, num_in: int, norm: tuple[jax.Array, float] | None
) -> list[jax.Array]:
    args = [_wide(x, num_in), panels, live]
    return args if norm is None else [*args, _wide(norm[0], num_in)]


def pack_panels(columns: Array) -> Array:
    """[G, C, K] bfloat16, NumPy, on the host -> [panels, K / 2, 32, 2]; a panel has 32 / G columns of each group.

    What is missing in the last panel, and of K to a multiple of 16, is 0. A few panels at a time: beside the result
    there is next to nothing.
    """
    num_groups, num_columns, num_in = columns.shape
    width, wide_in = PANEL // num_groups, -(-num_in // LANES) * LANES
    panels = np.empty((-(-num_columns // width), wide_in // 2, PANEL), np.uint32)
    for first in range(0, len(panels), _PANELS_AT_ONCE):
        part = columns[:, first * width : (first + _PANELS_AT_ONCE) * width]
        num_panels = -(-part.shape[1] // width)
        wide = np.zeros((num_groups, num_panels * width, wide_in), columns.dtype)
        wide[:, : part.shape[1], :num_in] = part
        pairs = wide.view(np.uint32).reshape(num_groups, num_panels, width, -1)
        panels[first : first + num_panels] = pairs.transpose(1, 3, 0, 2).reshape(num_panels, -1, PANEL)
    return panels.view(columns.dtype).reshape(*panels.shape, 2)


def _wide(x: jax.Array, num_columns: int) -> jax.Array:
    """With columns of 0 behind its own."""
    missing = num_columns - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def _panels_per_item(num_rows: int, num_panels: int, *, normed: bool) -> int:
    """Rows that are made cost more than half of a panel's product: so an item is many panels. Where there are several
    blocks of rows, each block's items go evenly on all threads."""
    if not normed or num_rows <= _MAX_BLOCK_ROWS:
        return share_panels(num_panels, most=6)
    threads = os.cpu_count() or 1
    rounds = -(-num_panels // (_MADE_PANELS * threads))
    return -(-num_panels // (rounds * threads))


def share_panels(num_panels: int, *, most: int, overhead: float = 0) -> int:
    """Panels of an item: neighbouring panels are read in one go, but the last items should end together, and a thread
    that starts late should find some. overhead: what an item costs besides, in panels."""
    threads = os.cpu_count() or 1
    fewest = max(2, -(-num_panels // (most * threads)))
    sizes = {rounds: -(-num_panels // (rounds * threads)) for rounds in range(fewest, fewest + 4)}
    return sizes[min(sizes, key=lambda rounds: (rounds * (sizes[rounds] + overhead), rounds))]


def _chains(num_in: int) -> int:
    """Sums beside each other, so that none waits for the one before."""
    return next(chains for chains in (4, 3, 2, 1) if num_in % (LANES * chains) == 0)
