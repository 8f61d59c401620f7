"""A step cut into items for the persistent kernel. Plain traced jnp, once a step; every layer reads it.

A tile is up to `tile_tokens` query tokens of one sequence. Its keys are one item, or several of equal length where
there would be too few items to fill the card (long decodes, small families): split-K, merged by log-sum-exp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from kernels_pallas.geometry import Geometry
from kernels_pallas.gpu import kernel
from kernels_pallas.gpu.blocks import DECODE, NUM_SMS, TILES, WGMMA_ROWS, Blocks

_MIN_DECODE_SPLITS = 8  # one long sequence among many short ones must not be left to one multiprocessor
_MAX_SPLITS = 64
_Rows = TypeVar("_Rows", int, jax.Array)
ROW_ALIGNMENT = 8  # rows of a swizzle tile: TMA copies start at a whole one


class Items(NamedTuple):
    """Work for one launch. table [max_items, 8] int32 (columns: `kernel.SEQ` ...), live up to num_items [1].

    Of query token t of the launch: its first item, its number of items (0: it sees no key) and its first row in the
    tile, each [tokens] int32. source [num_rows] int32: which of a key head's query rows (token * G + head of the group)
    the kernel's row is; tiles start at whole swizzle tiles, as TMA demands.
    """

    table: jax.Array
    num_items: jax.Array
    first_item: jax.Array
    num_splits: jax.Array
    row: jax.Array
    source: jax.Array


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of the kernel: which of the step's sequences and tokens it serves, and the static bounds of it."""

    geometry: Geometry
    blocks: Blocks
    first_seq: int
    num_seqs: int
    first_token: int
    num_tokens: int

    @property
    def tile_tokens(self) -> int:
        return 1 if self.blocks.split_keys else self.blocks.tile_rows // self.geometry.group

    @property
    def tile_stride(self) -> int:
        """Rows from the start of a sequence's tile to that of its next: its tokens' rows, to whole swizzle tiles."""
        return _align(self.tile_tokens * self.geometry.group)

    @property
    def num_rows(self) -> int:
        """Query rows, each tile's padded to a whole swizzle tile, and a tile more: the kernel reads whole tiles."""
        return _align(self.num_tokens * self.geometry.group) + self.max_tiles * ROW_ALIGNMENT + self.blocks.tile_rows

    @property
    def max_tiles(self) -> int:
        if self.blocks.split_keys:
            return self.num_seqs
        return min(self.num_tokens, self.num_tokens // self.tile_tokens + self.num_seqs)

    @property
    def wanted_items(self) -> int:
        """Items of a key head that fill the card evenly."""
        return math.ceil(self.blocks.waves * NUM_SMS / self.geometry.num_kv_heads)

    @property
    def max_splits(self) -> int:
        """Items of one tile: a power of two, no more than the longest possible sequence allows."""
        usual_tiles = max(1, self.num_tokens // self.tile_tokens)
        splits = math.ceil(self.wanted_items / usual_tiles)
        splits = max(splits, _MIN_DECODE_SPLITS if self.blocks.split_keys else 1)
        keys = self.geometry.pages_per_seq * self.geometry.page_size
        splits = min(splits, _MAX_SPLITS, math.ceil(keys / self.blocks.min_split_keys))
        return 1 << (splits - 1).bit_length()

    @property
    def max_items(self) -> int:
        return min(self.max_tiles * self.max_splits, self.max_tiles + self.wanted_items)

    @property
    def split_unit(self) -> int:
        """A part's keys come in whole pages and whole rounds of the consumers."""
        apart = self.blocks.num_consumers if self.blocks.split_keys else 1
        return max(self.blocks.block_kv * apart, self.geometry.page_size)


def launches(geometry: Geometry) -> list[Launch]:
    """Decode slots first, then everything else; a group too large for the decode kernel's tile takes the other one."""
    slots = geometry.num_decode_slots if geometry.group <= WGMMA_ROWS else 0
    found = []
    for blocks, first, end, token_end in (
        (DECODE, 0, slots, slots),
        (TILES, slots, geometry.num_seqs, geometry.num_tokens),
    ):
        if end > first and token_end > first:
            launch = Launch(
                geometry=geometry,
                blocks=blocks[geometry.head_dim],
                first_seq=first,
                num_seqs=end - first,
                first_token=first,
                num_tokens=token_end - first,
            )
            found.append(launch)
    return found


def make_schedule(
    cu_q_lens: jax.Array, kv_starts: jax.Array, kv_lens: jax.Array, num_seqs: jax.Array, *, geometry: Geometry
) -> list[Items]:
    """See `kernels_pallas.backends.MakeSchedule`. One `Items` for each of `launches(geometry)`."""
    live = jnp.arange(geometry.num_seqs, dtype=jnp.int32) < num_seqs[0]
    ends = jnp.where(live, cu_q_lens[1:], cu_q_lens[num_seqs[0]])  # rows past the last sequence may hold anything
    starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends[:-1]])
    found = []
    for launch in launches(geometry):
        part = slice(launch.first_seq, launch.first_seq + launch.num_seqs)
        keys = (jnp.where(live, x, 0)[part] for x in (kv_starts, kv_lens))
        found.append(_items(launch, starts[part], ends[part], *keys))
    return found


class _Tiles(NamedTuple):
    """[max_tiles] int32 each: sequence of the launch, first row, position of the first token, range of keys."""

    seq: jax.Array
    row: jax.Array
    position: jax.Array
    begin: jax.Array
    end: jax.Array


def _items(launch: Launch, starts: jax.Array, ends: jax.Array, kv_starts: jax.Array, kv_lens: jax.Array) -> Items:
    group, max_tiles = launch.geometry.group, launch.max_tiles
    num_tiles = -(-(ends - starts) // launch.tile_tokens)
    tile_ends = jnp.cumsum(num_tiles, dtype=jnp.int32)
    tile_starts = tile_ends - num_tiles
    last_tokens = (ends - starts) - jnp.maximum(num_tiles - 1, 0) * launch.tile_tokens
    num_rows = jnp.maximum(num_tiles - 1, 0) * launch.tile_stride + _align(last_tokens * group)
    row_starts = jnp.cumsum(num_rows, dtype=jnp.int32) - num_rows

    tile = jnp.arange(max_tiles, dtype=jnp.int32)
    seq = _bucket(tile_ends, tile)
    in_seq = tile - tile_starts[seq]
    position = kv_lens[seq] - (ends - starts)[seq] + in_seq * launch.tile_tokens
    end = kv_lens[seq]
    if launch.geometry.causal:
        end = jnp.minimum(end, position + launch.tile_tokens)
    tiles = _Tiles(
        seq=launch.first_seq + seq,
        row=row_starts[seq] + in_seq * launch.tile_stride,
        position=position,
        begin=kv_starts[seq],
        end=jnp.where(tile < tile_ends[-1], end, 0),
    )
    table, first_item, splits, num_items = _cut(launch, tiles)

    token = launch.first_token + jnp.arange(launch.num_tokens, dtype=jnp.int32)
    owned = token < ends[-1]
    seq = _bucket(ends, token)
    in_seq = token - starts[seq]
    tile_of_token = jnp.minimum(tile_starts[seq] + in_seq // launch.tile_tokens, max_tiles - 1)
    row = in_seq % launch.tile_tokens * group
    target = jnp.where(owned, tiles.row[tile_of_token] + row, launch.num_rows)[:, None] + jnp.arange(group)
    rows_of_q = token[:, None] * group + jnp.arange(group, dtype=jnp.int32)
    return Items(
        table=table,
        num_items=num_items,
        first_item=first_item[tile_of_token],
        num_splits=jnp.where(owned, splits[tile_of_token], 0),
        row=row,
        source=jnp.zeros((launch.num_rows,), jnp.int32).at[target].set(rows_of_q, mode="drop", unique_indices=True),
    )


def _cut(launch: Launch, tiles: _Tiles) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The table of items, each tile's first item and number of items, and how many items there are."""
    splits, part = _split(launch, jnp.maximum(tiles.end - tiles.begin, 0))
    # Last tile first: of a prompt it sees the most keys, and the longest items should start first.
    item_ends = jnp.cumsum(splits[::-1], dtype=jnp.int32)
    first_item = (item_ends - splits[::-1])[::-1]
    item = jnp.arange(launch.max_items, dtype=jnp.int32)
    tile = launch.max_tiles - 1 - _bucket(item_ends, item)
    begin = tiles.begin[tile] + (item - first_item[tile]) * part[tile]
    columns = {
        kernel.SEQ: tiles.seq[tile],
        kernel.FIRST_ROW: tiles.row[tile],
        kernel.KEY_BEGIN: begin,
        kernel.KEY_END: jnp.minimum(begin + part[tile], tiles.end[tile]),
        kernel.POSITION: tiles.position[tile],
    }
    nothing = jnp.zeros_like(item)
    table = jnp.stack([columns.get(field, nothing) for field in range(kernel.ITEM_FIELDS)], axis=1)
    return table, first_item, splits, item_ends[-1:]


def _split(launch: Launch, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """lengths [max_tiles], keys of each tile -> its number of items and the keys of each but the last."""
    unit = launch.split_unit
    fair = -(-lengths.sum(dtype=jnp.int32) // launch.wanted_items)
    longest = jnp.maximum(jnp.maximum(fair, -(-lengths.max() // launch.max_splits)), launch.blocks.min_split_keys)
    splits = jnp.minimum(-(-lengths // longest), launch.max_splits)
    even = -(-lengths // jnp.maximum(splits, 1))
    part = -(-even // unit) * unit
    return -(-lengths // jnp.maximum(part, 1)), part


def _bucket(ends: jax.Array, values: jax.Array) -> jax.Array:
    """Index of the first of the ascending `ends` [n] past each value, at most n - 1. One comparison matrix: no loop."""
    found = jnp.searchsorted(ends, values, side="right", method="compare_all").astype(jnp.int32)
    return jnp.minimum(found, ends.shape[0] - 1)


def _align(rows: _Rows) -> _Rows:
    return -(-rows // ROW_ALIGNMENT) * ROW_ALIGNMENT
