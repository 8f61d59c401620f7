"""Paged attention in plain jax.numpy: the CPU's path, and what every other backend falls back to.

Both halves are flash attention over blocks of keys with a running maximum and sum, and loops whose length is data, so
that one compiled program serves every context length:

- decode slots: all slots at once, block after block of keys (`_DECODE_BLOCK_KEYS`);
- prompt chunks and families: query tile after query tile, each reading only the keys it may see.

Letters: T tokens, S sequences, H = Hkv key heads, G query heads a key head, D head dim, B keys of a block, Q query
tile, R = Q * G rows of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.geometry import Geometry
from kernels_pallas.layout import from_storage, to_storage

_DECODE_BLOCK_KEYS = 64
_PREFILL_BLOCK_KEYS = 256
# Query tiles, largest first. A large one reads its keys once for many rows and pays for a loop's dozen operations once.
_PROMPT_TILES = (256, 64)
_FAMILY_TILES = (16,)  # of decoding members: 16 of them with 3 query heads are 48 rows of a matrix product
_NO_SCORE = -1e30  # below any score


class JnpSchedule(NamedTuple):
    """Query tiles of the ragged sequences, behind the decode slots; one for each size of `_tile_sizes`.

    seqs, first [N]: the sequence of each tile, and its first query, counted in the sequence. num_tiles []: of the N.
    """

    seqs: jax.Array
    first: jax.Array
    num_tiles: jax.Array


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """What turns products of queries and keys into scores, and which of them count."""

    causal: bool
    sliding_window: int | None
    soft_cap: float | None

    def first_key(self, kv_start: jax.Array, position: jax.Array, page_size: int) -> jax.Array:
        """Where a loop for queries at `position` and later begins: a multiple of the page size."""
        if self.sliding_window is None:
            return kv_start
        return jnp.maximum(kv_start, (position - self.sliding_window + 1) // page_size * page_size)

    def visible(self, key: jax.Array, kv_len: jax.Array, position: jax.Array) -> jax.Array:
        seen = key < kv_len
        if self.causal:
            seen &= key <= position
        if self.sliding_window is not None:
            seen &= key > position - self.sliding_window
        return seen


class _Softmax(NamedTuple):
    """Running state of a softmax-weighted sum: maximum [..., R], sum [..., R], accumulator [..., R, D], all float32."""

    maximum: jax.Array
    total: jax.Array
    acc: jax.Array

    @classmethod
    def start(cls, rows: tuple[int, ...], head_dim: int) -> _Softmax:
        return cls(
            jnp.full(rows, _NO_SCORE, jnp.float32),
            jnp.zeros(rows, jnp.float32),
            jnp.zeros((*rows, head_dim), jnp.float32),
        )

    def add(
        self, q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array | None, soft_cap: float | None
    ) -> _Softmax:
        """q [..., R, D] (scaled), k, v [..., B, D], visible [..., R, B]; None: all is."""
        precision = lax.Precision.HIGHEST if k.dtype == jnp.float32 else None
        scores = jnp.einsum("...rd,...bd->...rb", q, k, preferred_element_type=jnp.float32, precision=precision)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        if visible is not None:
            scores = jnp.where(visible, scores, -jnp.inf)
        maximum = jnp.maximum(self.maximum, scores.max(axis=-1))  # finite, because it starts so
        weights = jnp.exp(scores - maximum[..., None])
        keep = jnp.exp(self.maximum - maximum)
        update = jnp.einsum(
            "...rb,...bd->...rd",
            _narrowed(weights, v.dtype),
            v,
            preferred_element_type=jnp.float32,
            precision=precision,
        )
        return _Softmax(maximum, self.total * keep + weights.sum(axis=-1), self.acc * keep[..., None] + update)

    def finish(self) -> tuple[jax.Array, jax.Array]:
        """out [..., R, D] and lse [..., R]; zeros and -inf where nothing was visible."""
        seen = self.total > 0.0
        total = jnp.where(seen, self.total, 1.0)
        out = jnp.where(seen[..., None], self.acc / total[..., None], 0.0)
        return out, jnp.where(seen, self.maximum + jnp.log(total), -jnp.inf)


def _narrowed(weights: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Weights (finite, at least 0) in `dtype`, rounded to nearest even.

    By hand for bfloat16: XLA's conversion on the CPU looks for NaN in every number and takes twice as long.
    """
    if dtype != jnp.bfloat16:
        return weights.astype(dtype)
    bits = lax.bitcast_convert_type(weights, jnp.uint32)
    rounded = bits + jnp.uint32(0x7FFF) + ((bits >> 16) & jnp.uint32(1))
    return lax.bitcast_convert_type((rounded >> 16).astype(jnp.uint16), jnp.bfloat16)


def check(geometry: Geometry, *, sliding_window: int | None, soft_cap: float | None) -> None:
    """Serves whatever a `Geometry` can say."""


def write_kv(kv_pages: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array) -> jax.Array:
    """See `kernels_pallas.write_kv`."""
    num_pages, num_heads, _, page_size, head_dim = kv_pages.shape
    page, offset = slots // page_size, slots % page_size
    head, half = jnp.arange(num_heads, dtype=jnp.int32), jnp.arange(2, dtype=jnp.int32)
    block = (page[:, None, None] * num_heads + head[None, :, None]) * 2 + half[None, None, :]
    rows = block * page_size + offset[:, None, None]  # [T, H, 2]
    values = to_storage(jnp.stack([k, v], axis=2), kv_pages)  # [T, H, 2, D]
    flat = kv_pages.reshape(num_pages * num_heads * 2 * page_size, head_dim)
    return flat.at[rows].set(values, mode="drop", unique_indices=True).reshape(kv_pages.shape)


def make_schedule(
    cu_q_lens: jax.Array, kv_starts: jax.Array, kv_lens: jax.Array, num_seqs: jax.Array, *, geometry: Geometry
) -> tuple[JnpSchedule, ...]:
    """See `kernels_pallas.backends.Backend`."""
    slots = geometry.num_decode_slots
    seq_ids = jnp.arange(slots, geometry.num_seqs, dtype=jnp.int32)
    q_lens = jnp.where(seq_ids < num_seqs[0], (cu_q_lens[1:] - cu_q_lens[:-1])[slots:], 0)
    if not len(seq_ids):
        return ()
    sizes = _tile_sizes(geometry)
    first = jnp.zeros_like(q_lens)  # query of each sequence that no larger tile has taken
    schedules = []
    for tile in sizes:
        # The smallest size takes what is left, a larger one what fills more than half of a tile.
        spare = tile - 1 if tile == sizes[-1] else tile // 2 - 1
        counts = jnp.maximum(q_lens - first + spare, 0) // tile
        ends = jnp.cumsum(counts, dtype=jnp.int32)
        tiles = jnp.arange(geometry.num_tokens // tile + len(seq_ids), dtype=jnp.int32)
        seqs = jnp.minimum(jnp.sum(ends[None, :] <= tiles[:, None], axis=1, dtype=jnp.int32), len(seq_ids) - 1)
        schedules.append(JnpSchedule(seqs, first[seqs] + (tiles - (ends - counts)[seqs]) * tile, ends[-1]))
        first = jnp.minimum(first + counts * tile, q_lens)
    return tuple(schedules)


def attend(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    kv_starts: jax.Array,
    kv_lens: jax.Array,
    num_seqs: jax.Array,
    schedule: tuple[JnpSchedule, ...],
    *,
    geometry: Geometry,
    causal: bool,
    sm_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.backends.Attend`."""
    scores = _Scores(causal=causal, sliding_window=sliding_window, soft_cap=soft_cap)
    # Of queries and pages the wider, so that float32 queries lose nothing to bfloat16 pages; 8 bits are no such dtype.
    from_queries = geometry.quantised or geometry.q_dtype == jnp.float32
    tile_dtype = geometry.q_dtype if from_queries else geometry.page_dtype
    slots, num_tokens = geometry.num_decode_slots, geometry.num_tokens
    rows = q.astype(jnp.float32) * sm_scale
    rows = rows.reshape(num_tokens, geometry.num_kv_heads, geometry.group, geometry.head_dim)
    parts = []
    if slots:
        lens = jnp.where(jnp.arange(slots) < num_seqs[0], kv_lens[:slots], 0)
        parts.append(_decode(rows[:slots], kv_pages, page_table[:slots], kv_starts[:slots], lens, scores))
    if num_tokens > slots and geometry.num_seqs > slots:
        ragged = _Ragged(page_table[slots:], cu_q_lens[slots:] - slots, kv_starts[slots:], kv_lens[slots:])
        parts.append(
            _all_tiles(rows[slots:].astype(tile_dtype), kv_pages, ragged, schedule, scores, _tile_sizes(geometry))
        )
    elif num_tokens > slots:  # padding alone
        rest = rows[slots:]
        parts.append((jnp.zeros_like(rest, jnp.float32), jnp.full(rest.shape[:-1], -jnp.inf)))
    out = jnp.concatenate([out for out, _ in parts]).reshape(q.shape)
    lse = jnp.concatenate([lse for _, lse in parts]).reshape(q.shape[:2])
    return out, lse


class _Ragged(NamedTuple):
    """The sequences behind the decode slots; cu_q_lens count from the first token behind them."""

    page_table: jax.Array
    cu_q_lens: jax.Array
    kv_starts: jax.Array
    kv_lens: jax.Array


def _tile_sizes(geometry: Geometry) -> tuple[int, ...]:
    """Queries of a tile, largest first."""
    num_tokens = max(1, geometry.num_tokens - geometry.num_decode_slots)
    sizes = _PROMPT_TILES if geometry.causal else _FAMILY_TILES
    # Every size costs time to compile: a large one has to be met more than once in a step.
    return tuple(size for size in sizes if 2 * size <= num_tokens) or (min(sizes[-1], num_tokens),)


def _gather(kv_pages: jax.Array, pages: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """pages [..., n] -> k, v [..., H, n * page_size, D], in one gather each, with no transposition after it."""
    num_pages, num_heads, _, page_size, head_dim = kv_pages.shape
    flat = kv_pages.reshape(num_pages * num_heads * 2, page_size * head_dim)
    head = jnp.arange(num_heads, dtype=jnp.int32)
    index = (pages[..., None, :] * num_heads + head[:, None]) * 2
    shape = (*index.shape[:-1], index.shape[-1] * page_size, head_dim)
    k, v = (from_storage(flat[i].reshape(shape)).astype(dtype) for i in (index, index + 1))
    return k, v


def _decode(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    kv_starts: jax.Array,
    kv_lens: jax.Array,
    how: _Scores,
) -> tuple[jax.Array, jax.Array]:
    """q [S, H, G, D] float32, one query a sequence; kv_starts, kv_lens [S] -> out [S, H, G, D], lse [S, H, G].

    In float32 whatever the pages' dtype: XLA's gather of 16-bit numbers on the CPU takes about twice as long as one
    that widens them in the same loop, and products this small gain nothing from bfloat16.
    """
    page_size = kv_pages.shape[3]
    block_pages = max(1, _DECODE_BLOCK_KEYS // page_size)
    block_keys = block_pages * page_size
    first = how.first_key(kv_starts, kv_lens - 1, page_size)

    def add_block(i: jax.Array, state: _Softmax) -> _Softmax:
        column = (first // page_size + i * block_pages)[:, None] + jnp.arange(block_pages, dtype=jnp.int32)[None, :]
        pages = jnp.take_along_axis(page_table, jnp.minimum(column, page_table.shape[1] - 1), axis=1)
        k, v = _gather(kv_pages, pages, q.dtype)
        key = (first + i * block_keys)[:, None] + jnp.arange(block_keys, dtype=jnp.int32)[None, :]
        visible = how.visible(key, kv_lens[:, None], kv_lens[:, None] - 1)
        v = jnp.where(visible[:, None, :, None], v, jnp.zeros((), v.dtype))  # a page may hold anything past its end
        return state.add(q, k, v, visible[:, None, None, :], how.soft_cap)

    num_blocks = (jnp.max(kv_lens - first) + block_keys - 1) // block_keys
    state: _Softmax = lax.fori_loop(0, num_blocks, add_block, _Softmax.start(q.shape[:3], q.shape[3]))
    return state.finish()


def _all_tiles(
    q: jax.Array,
    kv_pages: jax.Array,
    ragged: _Ragged,
    schedule: tuple[JnpSchedule, ...],
    how: _Scores,
    sizes: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """q [T, H, G, D] ragged -> out [T, H, G, D], lse [T, H, G]. One loop over tiles for each size of them."""
    num_tokens, num_kv_heads, group, head_dim = q.shape
    q = jnp.pad(q, ((0, sizes[0]), (0, 0), (0, 0), (0, 0)))
    outs = (
        jnp.zeros((num_tokens + sizes[0], num_kv_heads, group, head_dim), jnp.float32),
        jnp.full((num_tokens + sizes[0], num_kv_heads, group), -jnp.inf, jnp.float32),
    )
    for tiles, size in zip(schedule, sizes, strict=True):
        outs = _tiles(q, kv_pages, ragged, tiles, how, size, outs)
    return outs[0][:num_tokens], outs[1][:num_tokens]


def _tiles(
    q: jax.Array,
    kv_pages: jax.Array,
    ragged: _Ragged,
    schedule: JnpSchedule,
    how: _Scores,
    tile: int,
    outs: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Writes the results of the schedule's tiles, of `tile` queries each, into outs: [T + padding, H, G, D] and lse."""
    num_kv_heads, group, head_dim = q.shape[1:]

    def attend_tile(t: jax.Array, outs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        seq, first = schedule.seqs[t], schedule.first[t]
        start = ragged.cu_q_lens[seq] + first
        rows = lax.dynamic_slice_in_dim(q, start, tile).transpose(1, 0, 2, 3)
        rows = rows.reshape(num_kv_heads, tile * group, head_dim)
        out, lse = _attend_tile(rows, kv_pages, ragged, seq, first, tile, how)
        out = out.reshape(num_kv_heads, tile, group, head_dim).transpose(1, 0, 2, 3)
        lse = lse.reshape(num_kv_heads, tile, group).transpose(1, 0, 2)
        mine = jnp.arange(tile, dtype=jnp.int32) < ragged.cu_q_lens[seq + 1] - start

        def put(whole: jax.Array, part: jax.Array) -> jax.Array:
            """What lies behind the sequence's end is another one's, and may be there already."""
            there = lax.dynamic_slice_in_dim(whole, start, tile)
            part = jnp.where(mine.reshape(-1, *(1,) * (part.ndim - 1)), part, there)
            return lax.dynamic_update_slice_in_dim(whole, part, start, 0)

        return put(outs[0], out), put(outs[1], lse)

    result: tuple[jax.Array, jax.Array] = lax.fori_loop(0, schedule.num_tiles, attend_tile, outs)
    return result


def _attend_tile(
    rows: jax.Array, kv_pages: jax.Array, ragged: _Ragged, seq: jax.Array, first: jax.Array, tile: int, how: _Scores
) -> tuple[jax.Array, jax.Array]:
    """rows [H, R, D]: queries first : first + tile of sequence `seq` -> out [H, R, D], lse [H, R]."""
    page_size = kv_pages.shape[3]
    block_pages = max(1, _PREFILL_BLOCK_KEYS // page_size)
    block_keys = block_pages * page_size
    # Whole blocks behind the last column, so that no slice is shifted to the left.
    row_pages = jnp.pad(ragged.page_table[seq], (0, block_pages))
    kv_len, q_len = ragged.kv_lens[seq], ragged.cu_q_lens[seq + 1] - ragged.cu_q_lens[seq]
    position = kv_len - q_len + first
    first_key = how.first_key(ragged.kv_starts[seq], position, page_size)
    last_key = jnp.minimum(kv_len, position + tile) if how.causal else kv_len
    positions = jnp.minimum(position + jnp.arange(tile, dtype=jnp.int32), kv_len - 1)
    row_position = jnp.repeat(positions, rows.shape[1] // tile)[:, None]  # [R, 1]

    def gather(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        pages = lax.dynamic_slice_in_dim(row_pages, first_key // page_size + i * block_pages, block_pages)
        return _gather(kv_pages, pages, rows.dtype)

    def add_inner_block(i: jax.Array, state: _Softmax) -> _Softmax:
        """Keys that all of the tile's queries see, which needs no mask."""
        return state.add(rows, *gather(i), None, how.soft_cap)

    def add_block(i: jax.Array, state: _Softmax) -> _Softmax:
        k, v = gather(i)
        key = first_key + i * block_keys + jnp.arange(block_keys, dtype=jnp.int32)
        v = jnp.where((key < kv_len)[None, :, None], v, jnp.zeros((), v.dtype))
        return state.add(rows, k, v, how.visible(key[None, :], kv_len, row_position)[None], how.soft_cap)

    state: _Softmax = _Softmax.start(rows.shape[:2], rows.shape[2])
    num_inner = jnp.zeros((), jnp.int32)
    if tile == _PROMPT_TILES[0] and how.causal and how.sliding_window is None:  # worth a second loop to compile
        seen_by_all = jnp.minimum(position + 1, kv_len)
        num_inner = jnp.maximum(seen_by_all - first_key, 0) // block_keys
        state = lax.fori_loop(0, num_inner, add_inner_block, state)
    num_blocks = (last_key - first_key + block_keys - 1) // block_keys
    state = lax.fori_loop(num_inner, num_blocks, add_block, state)
    return state.finish()
