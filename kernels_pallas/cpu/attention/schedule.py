"""A step cut into tiles of queries. Plain traced jnp, once a step; every layer reads it."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.geometry import Geometry

TILE_ROWS = 288  # query rows of a tile at most: what is made of a block of keys serves them all
_SPLIT_ROWS = 96  # of a tile that is cut for the threads' sake
REGISTER_ROWS = 6  # of the kernel: 6 x 4 registers of sums, 4 of keys or values, and a few


class Tiles(NamedTuple):
    """table [max_tiles, 6] int32: the tiles, those with most work first. Columns: row of the page table, first token,
    number of tokens, position of the first one, first key, key after the last one. sizes [2] int32: number of tiles,
    columns of the page table. first_page [] int32: which page a 0 in the page table means.

    Every token of the step is in one tile; those of no sequence have no keys.
    """

    table: jax.Array
    sizes: jax.Array
    first_page: jax.Array


def tile_tokens(geometry: Geometry) -> int:
    return TILE_ROWS // geometry.group


def _rounds(geometry: Geometry) -> int:
    """Tiles of a sequence that has several are so many, or a multiple: their items then go evenly on all threads."""
    threads = os.cpu_count() or 1
    return min(threads // math.gcd(threads, geometry.num_kv_heads), 4)


def make_schedule(
    cu_q_lens: jax.Array, kv_starts: jax.Array, kv_lens: jax.Array, num_seqs: jax.Array, *, geometry: Geometry
) -> Tiles:
    """See `kernels_pallas.backends.MakeSchedule`."""
    slots, num_tokens = geometry.num_decode_slots, geometry.num_tokens
    live = jnp.arange(geometry.num_seqs, dtype=jnp.int32) < num_seqs[0]
    begins, kv_ends = jnp.where(live, kv_starts, 0), jnp.where(live, kv_lens, 0)
    slot = jnp.arange(slots, dtype=jnp.int32)
    ones = jnp.ones_like(slot)
    parts = [jnp.stack([slot, slot, ones, kv_ends[:slots] - 1, begins[:slots], kv_ends[:slots]], axis=1)]
    if num_tokens > slots:
        parts.append(_ragged(cu_q_lens, begins, kv_ends, live, geometry))
    table = jnp.concatenate(parts)
    work = jnp.maximum(table[:, 5] - table[:, 4], 0) * table[:, 2]
    order = jnp.argsort(jnp.where(table[:, 2] > 0, -work, 1))
    num_tiles = jnp.sum(table[:, 2] > 0, dtype=jnp.int32)
    return Tiles(table[order], jnp.stack([num_tiles, jnp.int32(geometry.pages_per_seq)]), jnp.int32(0))


def starting_at(tiles: Tiles, first_page: jax.Array) -> Tiles:
    """The same tiles where the layer's pages begin at `first_page` of the array."""
    return tiles._replace(first_page=first_page)


def _ragged(
    cu_q_lens: jax.Array, kv_starts: jax.Array, kv_lens: jax.Array, live: jax.Array, geometry: Geometry
) -> jax.Array:
    """Tiles of the sequences behind the decode slots, and of the tokens behind these; unused ones have no tokens."""
    slots, num_tokens, tile = geometry.num_decode_slots, geometry.num_tokens, tile_tokens(geometry)
    num_live = jnp.sum(live, dtype=jnp.int32)
    starts = jnp.maximum(jnp.where(live, cu_q_lens[:-1], cu_q_lens[num_live])[slots:], slots)
    starts = jnp.append(starts, jnp.maximum(cu_q_lens[num_live], slots))  # the last: of no sequence
    counts = jnp.append(starts[1:], num_tokens) - starts
    num_rows, rounds = len(range(slots, geometry.num_seqs)) + 1, _rounds(geometry)
    wanted = (counts + (tile - 1)) // tile
    few = jnp.sum(wanted[:-1]) < 2 * rounds
    cut = (wanted > 1) | (few & (counts * geometry.group >= _SPLIT_ROWS))
    wanted = jnp.where(cut, (wanted + (rounds - 1)) // rounds * rounds, wanted)
    sizes = (counts + wanted - 1) // jnp.maximum(wanted, 1)
    whole = REGISTER_ROWS // math.gcd(REGISTER_ROWS, geometry.group)  # tokens that fill register tiles
    sizes = jnp.clip((sizes + (whole - 1)) // whole * whole, 1, tile)
    ends = jnp.cumsum((counts + sizes - 1) // sizes, dtype=jnp.int32)
    at_most = min(num_tokens - slots, (num_tokens - slots) // tile + rounds * num_rows)
    tiles = jnp.arange(at_most, dtype=jnp.int32)
    seq = jnp.minimum(jnp.sum(ends[None, :] <= tiles[:, None], axis=1, dtype=jnp.int32), num_rows - 1)
    first = (tiles - jnp.append(0, ends[:-1])[seq]) * sizes[seq]
    size = jnp.clip(counts[seq] - first, 0, sizes[seq])
    begin, kv_len = (jnp.append(x[slots:], 0)[seq] for x in (kv_starts, kv_lens))
    position = kv_len - counts[seq] + first
    end = jnp.minimum(kv_len, position + size) if geometry.causal else kv_len
    row = jnp.minimum(seq + slots, geometry.num_seqs - 1)
    return jnp.stack([row, starts[seq] + first, size, position, begin, end], axis=1)
