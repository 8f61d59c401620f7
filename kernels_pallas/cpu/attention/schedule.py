"""A step cut into tiles of queries. Plain traced jnp, once a step; every layer reads it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.geometry import Geometry

TILE_ROWS = 192  # query rows of a tile at most: what is made of a block of keys serves them all


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
    num_rows = len(range(slots, geometry.num_seqs)) + 1
    ends = jnp.cumsum((counts + tile - 1) // tile, dtype=jnp.int32)
    tiles = jnp.arange(min(num_tokens - slots, (num_tokens - slots) // tile + num_rows), dtype=jnp.int32)
    seq = jnp.minimum(jnp.sum(ends[None, :] <= tiles[:, None], axis=1, dtype=jnp.int32), num_rows - 1)
    first = (tiles - jnp.append(0, ends[:-1])[seq]) * tile
    size = jnp.clip(counts[seq] - first, 0, tile)
    begin, kv_len = (jnp.append(x[slots:], 0)[seq] for x in (kv_starts, kv_lens))
    position = kv_len - counts[seq] + first
    end = jnp.minimum(kv_len, position + size) if geometry.causal else kv_len
    row = jnp.minimum(seq + slots, geometry.num_seqs - 1)
    return jnp.stack([row, starts[seq] + first, size, position, begin, end], axis=1)
