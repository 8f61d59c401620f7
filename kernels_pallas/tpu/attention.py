"""Paged attention on TPUs: one Mosaic kernel, compiled for decode and for prompt chunks.

The kernel walks a work list of query tiles (see `schedule`) and, for each, the blocks of keys that it may see. Blocks
arrive in a ring of VMEM buffers, page by page: all key heads of a page are one contiguous DMA. The ring runs on across
tiles, so that a tile's first block is on its way while the one before it is still being multiplied:

    DMA      | tile 0 block 0 | block 1 | block 2 | tile 1 block 0 | block 1 | tile 2 block 0 ...
    compute                   | block 0 | block 1 | block 2        | block 0 | block 1 ...

A tile's softmax runs over its blocks with a running maximum and sum, in base 2, all in float32.

Letters: H key heads, G query heads a key head, R rows of a tile (see `Tile`), B keys of a block, L lanes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.geometry import Geometry
from kernels_pallas.tpu import blocks
from kernels_pallas.tpu.blocks import LANES
from kernels_pallas.tpu.limits import check
from kernels_pallas.tpu.schedule import Schedule, Work
from kernels_pallas.tpu.tiles import Tile

Ref = Any
Scalar = Any  # an int32 scalar: traced, or a Python int

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)
# A masked score is below the maximum's start: its weight is zero even in a row that has seen no key.
_NO_MAXIMUM = -1e30
_MASKED = -2e30


class Numbers(NamedTuple):
    """The static numbers of the scores."""

    sm_scale: float
    sliding_window: int | None
    soft_cap: float | None


class Refs(NamedTuple):
    """The kernel's arguments, by role."""

    # scalar prefetch, in SMEM
    table: Ref  # [S * pages_per_seq]
    count: Ref  # [1]; of the work list, and then its columns, [N + 1]
    seq: Ref
    row: Ref
    start: Ref
    end: Ref
    position: Ref
    # inputs, in HBM
    q: Ref  # [H, rows, L]
    pages: Ref  # [P, H, parts, page_size, L]
    # outputs, in HBM
    out: Ref  # [H, rows, L] float32
    lse: Ref  # [rows, 128] float32, lane h being key head h
    # scratch, in VMEM
    kv_ring: Ref  # [buffers, block_pages, H, parts, page_size, L]
    q_tiles: Ref  # [2, H, R, L]
    out_tiles: Ref  # [2, H, R, L] float32
    lse_tiles: Ref  # [2, R, 128] float32
    maximum: Ref  # [H, R, 128] float32, the same in all lanes; in base 2
    total: Ref  # [H, R, 128] float32, the same in all lanes
    # DMA semaphores
    kv_done: Ref  # [buffers]
    q_done: Ref  # [2]
    out_done: Ref  # [2]
    lse_done: Ref  # [2]


class Cursor(NamedTuple):
    """A place in the sequence of all blocks of all tiles."""

    item: Scalar
    block: Scalar


def _kernel(*refs: Ref, tile: Tile, numbers: Numbers) -> None:
    r = Refs(*refs)
    count = r.count[0]

    @pl.when(count > 0)
    def _() -> None:
        _q_copy(r, tile, 0).start()

    cursor = Cursor(jnp.int32(0), jnp.int32(0))
    for slot in range(tile.buffers - 1):
        cursor = _fetch_next(r, tile, numbers, cursor, slot)

    def attend_tile(item: Scalar, carry: tuple[Scalar, Cursor]) -> tuple[Scalar, Cursor]:
        @pl.when(item + 1 < count)
        def _() -> None:
            _q_copy(r, tile, item + 1).start()

        r.maximum[...] = jnp.full_like(r.maximum, _NO_MAXIMUM)
        r.total[...] = jnp.zeros_like(r.total)
        r.out_tiles[item % 2] = jnp.zeros(r.out_tiles.shape[1:], jnp.float32)
        _q_copy(r, tile, item).wait()

        def attend_block(block: Scalar, carry: tuple[Scalar, Cursor]) -> tuple[Scalar, Cursor]:
            step, cursor = carry
            cursor = _fetch_next(r, tile, numbers, cursor, (step + tile.buffers - 1) % tile.buffers)
            _attend_block(r, tile, numbers, Cursor(item, block), step % tile.buffers)
            return step + 1, cursor

        carry = lax.fori_loop(0, _num_blocks(r, tile, numbers, item), attend_block, carry)
        _finish_tile(r, tile, item)
        return carry

    lax.fori_loop(0, count, attend_tile, (jnp.int32(0), cursor))

    @pl.when(count > 0)
    def _() -> None:
        for copy in _out_copies(r, tile, count - 1):
            copy.wait()


# --- which keys --------------------------------------------------------------------------------------------------


def _first_page(r: Refs, tile: Tile, numbers: Numbers, item: Scalar) -> Scalar:
    """The first page that a tile's queries see: its sequence's first, or the one in which the window starts."""
    first = r.start[item]
    if numbers.sliding_window is not None:
        first = jnp.maximum(first, r.position[item] - numbers.sliding_window + 1)
    return first // tile.page_size


def _num_blocks(r: Refs, tile: Tile, numbers: Numbers, item: Scalar) -> Scalar:
    num_keys = r.end[item] - _first_page(r, tile, numbers, item) * tile.page_size
    return (num_keys + tile.block_keys - 1) // tile.block_keys


def _block_pages(r: Refs, tile: Tile, numbers: Numbers, at: Cursor) -> tuple[Scalar, Scalar]:
    """The first page of a block, counted in its sequence, and how many pages it has."""
    first = _first_page(r, tile, numbers, at.item) + at.block * tile.block_pages
    num_pages = (r.end[at.item] + tile.page_size - 1) // tile.page_size - first
    return first, jnp.minimum(num_pages, tile.block_pages)


# --- copies ------------------------------------------------------------------------------------------------------


def _fetch_next(r: Refs, tile: Tile, numbers: Numbers, at: Cursor, slot: Scalar) -> Cursor:
    """Starts the copies of a block into a slot of the ring; returns the block after it."""
    live = at.item < r.count[0]

    @pl.when(live)
    def _() -> None:
        first, num_pages = _block_pages(r, tile, numbers, at)
        entry = r.seq[at.item] * tile.pages_per_seq + first

        def start(i: Scalar, _: None) -> None:
            _page_copy(r, r.table[entry + i], slot, i).start()

        lax.fori_loop(0, num_pages, start, None)

    is_last = at.block + 1 >= _num_blocks(r, tile, numbers, at.item)
    return Cursor(jnp.where(live & is_last, at.item + 1, at.item), jnp.where(is_last, 0, at.block + 1))


def _page_copy(r: Refs, page: Scalar, slot: Scalar, i: Scalar) -> Any:
    return pltpu.make_async_copy(r.pages.at[page], r.kv_ring.at[slot, i], r.kv_done.at[slot])


def _wait_for_block(r: Refs, num_pages: Scalar, slot: Scalar) -> None:
    def wait(i: Scalar, _: None) -> None:
        _page_copy(r, 0, slot, i).wait()

    lax.fori_loop(0, num_pages, wait, None)


def _rows_of(r: Refs, tile: Tile, item: Scalar) -> Any:
    return pl.ds(pl.multiple_of(r.row[item], 8 if tile.q_dtype == jnp.float32 else 16), tile.rows)


def _q_copy(r: Refs, tile: Tile, item: Scalar) -> Any:
    slot = item % 2
    return pltpu.make_async_copy(r.q.at[:, _rows_of(r, tile, item)], r.q_tiles.at[slot], r.q_done.at[slot])


def _out_copies(r: Refs, tile: Tile, item: Scalar) -> tuple[Any, Any]:
    slot, rows = item % 2, _rows_of(r, tile, item)
    return (
        pltpu.make_async_copy(r.out_tiles.at[slot], r.out.at[:, rows], r.out_done.at[slot]),
        pltpu.make_async_copy(r.lse_tiles.at[slot], r.lse.at[rows], r.lse_done.at[slot]),
    )


# --- arithmetic --------------------------------------------------------------------------------------------------


def _attend_block(r: Refs, tile: Tile, numbers: Numbers, at: Cursor, slot: Scalar) -> None:
    """Waits for a block and adds it to the softmax of its tile."""
    first, num_pages = _block_pages(r, tile, numbers, at)
    _wait_for_block(r, num_pages, slot)
    first_key = first * tile.page_size
    num_keys = r.end[at.item] - first_key

    @pl.when(num_keys < tile.block_keys)
    def _() -> None:
        _clear_values(r, tile, slot, num_keys // tile.page_size, tile.block_pages, lambda key: key < num_keys)

    if numbers.sliding_window is not None:
        first_seen = r.position[at.item] - numbers.sliding_window + 1 - first_key

        @pl.when(first_seen > 0)  # then the block's first page is where the window starts
        def _() -> None:
            _clear_values(r, tile, slot, 0, 1, lambda key: key >= first_seen)

    if tile.variant == "decode":  # few scores: masking costs less than asking
        _for_heads(r, tile, numbers, at.item, slot, first_key, mask=True)
        return
    position = r.position[at.item]
    masked = num_keys < tile.block_keys
    if tile.causal:
        masked |= first_key + tile.block_keys - 1 > position
    if numbers.sliding_window is not None:
        masked |= first_key <= position + tile.tokens - 1 - numbers.sliding_window

    for mask in (True, False):

        @pl.when(masked == mask)
        def _(mask: bool = mask) -> None:
            _for_heads(r, tile, numbers, at.item, slot, first_key, mask=mask)


def _for_heads(
    r: Refs, tile: Tile, numbers: Numbers, item: Scalar, slot: Scalar, first_key: Scalar, *, mask: bool
) -> None:
    """Adds a block to the softmax of every head, `tile.heads` of them at a time."""

    def add(i: Scalar, _: None) -> None:
        limits = _key_limits(r, tile, numbers, item, first_key) if mask else None
        _add_to_softmax(r, tile, numbers, item, slot, i * tile.heads, limits)

    lax.fori_loop(0, tile.num_kv_heads // tile.heads, add, None)


def _clear_values(
    r: Refs, tile: Tile, slot: Scalar, first: Scalar, end: Scalar, keep: Callable[[jax.Array], jax.Array]
) -> None:
    """Zeros for values of keys that nobody may see, in pages [first, end) of a block.

    They may be NaN, and then a weight of zero does not hide them in a product. (A score of NaN is replaced.)
    """

    def clear(i: Scalar, _: None) -> None:
        values = r.kv_ring[slot, i, :, tile.parts - 1]  # [H, page_size, L]
        key = lax.broadcasted_iota(jnp.int32, values.shape, 1) + i * tile.page_size
        kept = jnp.where(keep(key), values.astype(jnp.float32), 0.0)
        r.kv_ring[slot, i, :, tile.parts - 1] = kept.astype(values.dtype)

    lax.fori_loop(first, end, clear, None)


def _key_limits(
    r: Refs, tile: Tile, numbers: Numbers, item: Scalar, first_key: Scalar
) -> tuple[jax.Array, jax.Array | None]:
    """Keys [low, high) of the block that each row may see, [heads * R, 1] int32; low is None without a window."""
    end, position = r.end[item] - first_key, r.position[item] - first_key
    row = lax.broadcasted_iota(jnp.int32, (tile.heads * tile.rows, 1), 0)
    query = position + (row % tile.rows) // tile.group if tile.tokens > 1 else jnp.full_like(row, position)
    high = jnp.minimum(query + 1, end) if tile.causal else jnp.full_like(row, end)
    return high, None if numbers.sliding_window is None else query - numbers.sliding_window + 1


def _add_to_softmax(
    r: Refs,
    tile: Tile,
    numbers: Numbers,
    item: Scalar,
    slot: Scalar,
    first_head: Scalar,
    limits: tuple[jax.Array, jax.Array | None] | None,
) -> None:
    """One block of keys for `tile.heads` key heads: their rows are one array of scores, [heads * R, B]."""
    heads = pl.ds(first_head, tile.heads)

    def load(head: int, part: int) -> jax.Array:
        rows = r.kv_ring[slot, :, first_head + head, part]  # [block_pages, page_size, L]
        return _convert(rows, tile.compute_dtype).reshape(tile.block_keys, tile.lanes)

    q = r.q_tiles[item % 2, heads].astype(tile.compute_dtype)
    scores = jnp.concatenate([_dot(q[h], load(h, 0), transposed=True) for h in range(tile.heads)])
    if numbers.soft_cap is not None:
        scores = jnp.tanh(scores) * (numbers.soft_cap * _LOG2_E)
    if limits is not None:
        high, low = limits
        key = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        visible = key < high if low is None else (key < high) & (key >= low)
        scores = jnp.where(visible, scores, _MASKED)
    state = (tile.heads * tile.rows, LANES)
    before = r.maximum[heads].reshape(state)
    maximum = jnp.maximum(before, scores.max(axis=1, keepdims=True))
    keep = jnp.exp2(before - maximum)
    weights = jnp.exp2(scores - _widen(maximum, tile.block_keys))
    total = keep * r.total[heads].reshape(state) + weights.sum(axis=1, keepdims=True)
    r.maximum[heads] = maximum.reshape(tile.heads, tile.rows, LANES)
    r.total[heads] = total.reshape(tile.heads, tile.rows, LANES)
    weights = weights.reshape(tile.heads, tile.rows, tile.block_keys)
    keep = _widen(keep, tile.lanes).reshape(tile.heads, tile.rows, tile.lanes)
    for h in range(tile.heads):
        update = _dot(weights[h].astype(tile.compute_dtype), load(h, tile.parts - 1))
        at = (item % 2, first_head + h)
        r.out_tiles[at] = r.out_tiles[at] * keep[h] + update


def _convert(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """8-bit numbers go by way of float32, the only conversion of them that every generation has."""
    return (x.astype(jnp.float32) if x.dtype.itemsize == 1 else x).astype(dtype)


def _query_scale(numbers: Numbers) -> float:
    """What queries are multiplied by before the kernel: their scores are exponents of 2, or what a cap's tanh takes."""
    return numbers.sm_scale * _LOG2_E if numbers.soft_cap is None else numbers.sm_scale / numbers.soft_cap


def _dot(a: jax.Array, b: jax.Array, *, transposed: bool = False) -> jax.Array:
    """a [m, k] and b [k, n] (transposed: [n, k]) -> [m, n] float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _widen(x: jax.Array, width: int) -> jax.Array:
    """x [rows, 128], the same in all lanes -> [rows, width]."""
    return x[:, :width] if width <= LANES else jnp.concatenate([x] * (width // LANES), axis=1)


def _finish_tile(r: Refs, tile: Tile, item: Scalar) -> None:
    """Divides by the sums and starts the copies out."""
    slot = item % 2
    lane = lax.broadcasted_iota(jnp.int32, (tile.rows, LANES), 1)

    def finish(head: Scalar, lse: jax.Array) -> jax.Array:
        total = r.total[head]
        seen = total > 0.0
        inverse = jnp.where(seen, 1.0 / jnp.where(seen, total, 1.0), 0.0)
        r.out_tiles[slot, head] = r.out_tiles[slot, head] * _widen(inverse, tile.lanes)
        of_head = jnp.where(seen, (r.maximum[head] + jnp.log2(total)) * _LN_2, -jnp.inf)
        return jnp.where(lane == head, of_head, lse)

    r.lse_tiles[slot] = lax.fori_loop(0, tile.num_kv_heads, finish, jnp.zeros((tile.rows, LANES), jnp.float32))

    # A tile's rows past its sequence's end are the next sequence's: its own tile must be written after this one.
    @pl.when(item > 0)
    def _() -> None:
        for copy in _out_copies(r, tile, item - 1):
            copy.wait()

    for copy in _out_copies(r, tile, item):
        copy.start()


# --- the call ----------------------------------------------------------------------------------------------------


def attend(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    kv_starts: jax.Array,
    kv_lens: jax.Array,
    num_seqs: jax.Array,
    schedule: Schedule,
    *,
    geometry: Geometry,
    causal: bool,
    sm_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.backends.Attend`; `schedule` is `make_schedule`'s for the same lengths and geometry."""
    del cu_q_lens, kv_starts, kv_lens, num_seqs  # they are in the schedule
    check(geometry, sliding_window=sliding_window, soft_cap=soft_cap, tiles=schedule.tiles)
    if causal != geometry.causal:
        raise ValueError(f"causal: expected the geometry's {geometry.causal}, got {causal}")
    numbers = Numbers(sm_scale, sliding_window, soft_cap)
    slots = geometry.num_decode_slots
    parts = []
    for work, tokens, rows in (
        (schedule.decode, q[:slots], page_table[:slots]),
        (schedule.prefill, q[slots:], page_table[slots:]),
    ):
        if work is not None:
            parts.append(_attend_variant(tokens, kv_pages, rows, work, numbers, interpret))
        elif tokens.shape[0]:  # padding
            parts.append((jnp.zeros(tokens.shape, jnp.float32), jnp.full(tokens.shape[:2], -jnp.inf)))
    return jnp.concatenate([out for out, _ in parts]), jnp.concatenate([lse for _, lse in parts])


def _attend_variant(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    work: Work,
    numbers: Numbers,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[jax.Array, jax.Array]:
    """q [T, Hq, D] of the variant's tokens -> out [T, Hq, D], lse [T, Hq], float32."""
    tile = work.tile
    num_tokens, num_q_heads, head_dim = q.shape
    out, lse = _call(_to_rows(q, work, numbers), kv_pages, page_table, work, numbers, interpret)
    places = out.shape[1] // _place_rows(tile)
    out = out.reshape(tile.num_kv_heads, places, -1, tile.lanes)[:, :, : tile.group, tile.lanes - head_dim :]
    out = out[:, work.padded_row].swapaxes(0, 1).reshape(num_tokens, num_q_heads, head_dim)
    lse = lse.reshape(places, -1, LANES)[:, : tile.group, : tile.num_kv_heads]
    lse = lse[work.padded_row].swapaxes(1, 2).reshape(num_tokens, num_q_heads)
    # Rows that no tile has written hold anything.
    return jnp.where(work.visible[:, None, None], out, 0.0), jnp.where(work.visible[:, None], lse, -jnp.inf)


def _place_rows(tile: Tile) -> int:
    """Rows of a place in the padded array: a token's, in decode with their padding."""
    return tile.rows if tile.variant == "decode" else tile.group


def _to_rows(q: jax.Array, work: Work, numbers: Numbers) -> jax.Array:
    """q [T, Hq, D] -> [H, rows, L], scaled: every sequence's rows start at a tile of memory."""
    tile = work.tile
    q = q.astype(jnp.float32) * _query_scale(numbers)
    q = q.reshape(q.shape[0], tile.num_kv_heads, tile.group, tile.head_dim).astype(tile.q_dtype)
    padding = ((0, 0), (0, 0), (0, _place_rows(tile) - tile.group), (0, tile.lanes - tile.head_dim))
    q = jnp.pad(q, padding) if any(n for _, n in padding) else q
    q = q if tile.variant == "decode" else q[work.token_at]
    return q.swapaxes(0, 1).reshape(tile.num_kv_heads, -1, tile.lanes)


def _call(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    work: Work,
    numbers: Numbers,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[jax.Array, jax.Array]:
    """q [H, rows, L] -> out [H, rows, L] float32, lse [rows, 128] float32."""
    tile = work.tile
    num_rows = q.shape[1]
    any_space = pl.BlockSpec(memory_space=pl.ANY)
    state = pltpu.VMEM((tile.num_kv_heads, tile.rows, LANES), jnp.float32)
    tiles = (2, tile.num_kv_heads, tile.rows, tile.lanes)
    scalars = (page_table.reshape(-1), work.count, work.seq, work.row, work.start, work.end, work.position)
    return pl.pallas_call(  # type: ignore[no-any-return]
        partial(_kernel, tile=tile, numbers=numbers),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[any_space, any_space],
            out_specs=[any_space, any_space],
            scratch_shapes=[
                pltpu.VMEM(tile.kv_shape, kv_pages.dtype),
                pltpu.VMEM(tiles, tile.q_dtype),
                pltpu.VMEM(tiles, jnp.float32),
                pltpu.VMEM((2, tile.rows, LANES), jnp.float32),
                state,
                state,
                pltpu.SemaphoreType.DMA((tile.buffers,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((tile.num_kv_heads, num_rows, tile.lanes), jnp.float32),
            jax.ShapeDtypeStruct((num_rows, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=blocks.current_chip().vmem_budget,
            disable_bounds_checks=True,  # a check costs as much as starting a page's copy
        ),
        interpret=blocks.interpret_params(interpret),
        name=f"paged_attention_{tile.variant}",
    )(*scalars, q, kv_pages)
