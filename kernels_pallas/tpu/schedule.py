"""What a step's lengths mean for the kernel's loops: computed once a step, used by every layer.

    sequences (ragged)         tiles of query rows               work list, in SMEM
    a: 5 tokens  --------->    a0 a1 a2 a3 | a4 .. .. ..         seq  a  a  c
    b: no token                c0 c1 .. ..                       row  0  4  8
    c: 2 tokens                                                  keys [start, end), position of the first query

Tiles without a visible key are left out of the list: their tokens are answered without the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.geometry import Geometry
from kernels_pallas.tpu.blocks import BlockSizes
from kernels_pallas.tpu.tiles import Tile, tile_of


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["count", "seq", "row", "start", "end", "position", "padded_row", "token_at", "visible"],
    meta_fields=["tile"],
)
@dataclass(frozen=True, kw_only=True)
class Work:
    """One variant's work list. N tiles at most; all arrays int32 but `visible`.

    count [1]: tiles in the list. For each, [N + 1]: seq, the row of the variant's page table; row, of its first query
    in the padded array of rows; keys [start, end) that some query of it may see; position of its first query.
    token_at [padded tokens]: the token at a place of the padded array (any token where there is none).
    padded_row [tokens]: a token's place in it. visible [tokens] bool: whether it sees any key.
    """

    tile: Tile
    count: jax.Array
    seq: jax.Array
    row: jax.Array
    start: jax.Array
    end: jax.Array
    position: jax.Array
    token_at: jax.Array
    padded_row: jax.Array
    visible: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["decode", "prefill"], meta_fields=[])
@dataclass(frozen=True, kw_only=True)
class Schedule:
    """None: the geometry has no such tokens."""

    decode: Work | None
    prefill: Work | None

    @property
    def tiles(self) -> tuple[Tile, ...]:
        return tuple(work.tile for work in (self.decode, self.prefill) if work is not None)


def make_schedule(
    cu_q_lens: jax.Array,
    kv_starts: jax.Array,
    kv_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    geometry: Geometry,
    decode_sizes: BlockSizes | None = None,
    prefill_sizes: BlockSizes | None = None,
) -> Schedule:
    """The step's work lists, for `attend` with the same geometry.

    cu_q_lens [S + 1], kv_starts [S], kv_lens [S], num_seqs [1], all int32. The sizes are the chip's, unless given.
    """
    slots = geometry.num_decode_slots
    live = jnp.arange(geometry.num_seqs, dtype=jnp.int32) < num_seqs[0]
    ends = jnp.where(live, kv_lens, 0)
    decode = prefill = None
    if (tile := tile_of(geometry, "decode", decode_sizes)) is not None:
        decode = _decode_work(kv_starts[:slots], ends[:slots], tile)
    if (tile := tile_of(geometry, "prefill", prefill_sizes)) is not None:
        prefill = _prefill_work(
            jnp.minimum(cu_q_lens[slots:], cu_q_lens[num_seqs[0]]) - slots,
            kv_starts[slots:],
            ends[slots:],
            geometry.num_tokens - slots,
            tile,
        )
    return Schedule(decode=decode, prefill=prefill)


def _decode_work(start: jax.Array, end: jax.Array, tile: Tile) -> Work:
    seq = jnp.arange(end.shape[0], dtype=jnp.int32)
    visible = end > start
    count, (seqs, row, starts, ends) = _compact(visible, (seq, seq * tile.rows, start, end))
    return Work(
        tile=tile,
        count=count,
        seq=seqs,
        row=row,
        start=starts,
        end=ends,
        position=ends - 1,
        token_at=seq,
        padded_row=seq,
        visible=visible,
    )


def _prefill_work(cu_q_lens: jax.Array, start: jax.Array, kv_lens: jax.Array, num_tokens: int, tile: Tile) -> Work:
    """cu_q_lens [S + 1] counted from the first token of the variant, constant past the last sequence."""
    num_seqs = kv_lens.shape[0]
    q_start, q_lens = cu_q_lens[:-1], cu_q_lens[1:] - cu_q_lens[:-1]
    room = (q_lens + tile.align - 1) // tile.align * tile.align
    room_end = jnp.cumsum(room, dtype=jnp.int32)
    room_start = room_end - room
    tiles = (q_lens + tile.tokens - 1) // tile.tokens
    tiles_end = jnp.cumsum(tiles, dtype=jnp.int32)

    n = jnp.arange(tile.max_tiles(num_tokens, num_seqs), dtype=jnp.int32)
    seq = _owner(tiles_end, n)
    first = (n - (tiles_end - tiles)[seq]) * tile.tokens  # the tile's first query, counted in its sequence
    end = kv_lens[seq]
    position = kv_lens[seq] - q_lens[seq] + first
    if tile.causal:
        end = jnp.minimum(end, position + jnp.minimum(tile.tokens, q_lens[seq] - first))
    row = (room_start[seq] + first) * tile.group
    wanted = (n < tiles_end[-1]) & (end > start[seq])
    count, (seqs, rows, starts, ends, positions) = _compact(wanted, (seq, row, start[seq], end, position))

    place = jnp.arange(tile.padded_tokens(num_tokens, num_seqs), dtype=jnp.int32)
    owner = _owner(room_end, place)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    mine = _owner(cu_q_lens[1:], token)
    last_key = kv_lens[mine] - 1
    if tile.causal:
        last_key = last_key - q_lens[mine] + 1 + token - q_start[mine]
    return Work(
        tile=tile,
        count=count,
        seq=seqs,
        row=rows,
        start=starts,
        end=ends,
        position=positions,
        token_at=jnp.clip(q_start[owner] + place - room_start[owner], 0, num_tokens - 1),
        padded_row=room_start[mine] + token - q_start[mine],
        visible=(token < cu_q_lens[-1]) & (last_key >= start[mine]) & (kv_lens[mine] > start[mine]),
    )


def _owner(ends: jax.Array, places: jax.Array) -> jax.Array:
    """The sequence in whose range (they follow each other, ends [S] exclusive) a place lies; the last one past all."""
    owner = jnp.searchsorted(ends, places, side="right", method="compare_all").astype(jnp.int32)
    return jnp.minimum(owner, ends.shape[0] - 1)


def _compact(wanted: jax.Array, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The wanted entries to the front, [N] -> [N + 1]: the loop's look ahead may stand one past the end."""
    size = wanted.shape[0] + 1
    after = jnp.cumsum(wanted, dtype=jnp.int32)
    target = jnp.where(wanted, after - 1, size)
    compacted = tuple(jnp.zeros(size, jnp.int32).at[target].set(array, mode="drop") for array in arrays)
    return after[-1:], compacted
