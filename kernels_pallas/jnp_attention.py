"""Paged attention in plain jax.numpy: the CPU's path, and what every other backend falls back to.

Both halves are flash attention over blocks of keys with a running maximum and sum, and loops whose length is data, so
that one compiled program serves every context length:

- decode slots: all slots at once, block after block of keys (`_decode_block_keys`);
- prompt chunks: query tile after query tile, each reading only the keys it may see.

Letters: T tokens, S sequences, H = Hkv key heads, G query heads a key head, D head dim, B keys of a block, Q query
tile, R = Q * G rows of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.layout import from_storage, to_storage

_DECODE_BLOCK_KEYS = 64
_PREFILL_BLOCK_KEYS = 256
_QUERY_TILE = 64
_MASKED = -1e30


class _Softmax(NamedTuple):
    """Running state of a softmax-weighted sum: maximum [..., R], sum [..., R], accumulator [..., R, D], all float32."""

    maximum: jax.Array
    total: jax.Array
    acc: jax.Array

    @classmethod
    def start(cls, rows: tuple[int, ...], head_dim: int) -> _Softmax:
        return cls(
            jnp.full(rows, _MASKED, jnp.float32),
            jnp.zeros(rows, jnp.float32),
            jnp.zeros((*rows, head_dim), jnp.float32),
        )

    def add(self, q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> _Softmax:
        """q [..., R, D] (scaled), k, v [..., B, D], visible [..., R, B]."""
        precision = lax.Precision.HIGHEST if k.dtype == jnp.float32 else None
        scores = jnp.einsum("...rd,...bd->...rb", q, k, preferred_element_type=jnp.float32, precision=precision)
        scores = jnp.where(visible, scores, _MASKED)
        maximum = jnp.maximum(self.maximum, scores.max(axis=-1))
        weights = jnp.where(visible, jnp.exp(scores - maximum[..., None]), 0.0)
        keep = jnp.exp(self.maximum - maximum)
        update = jnp.einsum(
            "...rb,...bd->...rd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32, precision=precision
        )
        return _Softmax(maximum, self.total * keep + weights.sum(axis=-1), self.acc * keep[..., None] + update)

    def finish(self) -> tuple[jax.Array, jax.Array]:
        """out [..., R, D] and lse [..., R]; zeros and -inf where nothing was visible."""
        seen = self.total > 0.0
        total = jnp.where(seen, self.total, 1.0)
        out = jnp.where(seen[..., None], self.acc / total[..., None], 0.0)
        return out, jnp.where(seen, self.maximum + jnp.log(total), -jnp.inf)


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


def paged_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    num_decode_slots: int,
    sm_scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.paged_attention`; always returns (out, lse)."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = kv_pages.shape[1]
    compute_dtype = from_storage(kv_pages[:0]).dtype
    scaled = (q.astype(jnp.float32) * sm_scale).astype(compute_dtype)
    scaled = scaled.reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    parts = []
    if num_decode_slots:
        lens = jnp.where(jnp.arange(num_decode_slots) < num_seqs[0], kv_lens[:num_decode_slots], 0)
        parts.append(_decode(scaled[:num_decode_slots], kv_pages, page_table[:num_decode_slots], lens))
    if page_table.shape[0] > num_decode_slots:
        parts.append(
            _prefill(
                scaled[num_decode_slots:],
                kv_pages,
                page_table[num_decode_slots:],
                cu_q_lens[num_decode_slots:] - num_decode_slots,
                kv_lens[num_decode_slots:],
                num_seqs[0] - num_decode_slots,
            )
        )
    elif num_tokens > num_decode_slots:  # padding alone
        rest = scaled[num_decode_slots:]
        parts.append((jnp.zeros_like(rest, jnp.float32), jnp.full(rest.shape[:-1], -jnp.inf)))
    out = jnp.concatenate([out for out, _ in parts]).reshape(num_tokens, num_heads, head_dim)
    lse = jnp.concatenate([lse for _, lse in parts]).reshape(num_tokens, num_heads)
    return out.astype(q.dtype), lse


def _gather(kv_pages: jax.Array, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
    """pages [..., n] -> k, v [..., H, n * page_size, D], in one gather each, with no transposition after it."""
    num_pages, num_heads, _, page_size, head_dim = kv_pages.shape
    flat = kv_pages.reshape(num_pages * num_heads * 2, page_size * head_dim)
    head = jnp.arange(num_heads, dtype=jnp.int32)
    index = (pages[..., None, :] * num_heads + head[:, None]) * 2
    shape = (*index.shape[:-1], index.shape[-1] * page_size, head_dim)
    return from_storage(flat[index].reshape(shape)), from_storage(flat[index + 1].reshape(shape))


def _pad_table(page_table: jax.Array, block_pages: int) -> jax.Array:
    """Whole blocks of pages a row, so that the last block's slice is never shifted to the left."""
    return jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % block_pages)))


def _decode(
    q: jax.Array, kv_pages: jax.Array, page_table: jax.Array, kv_lens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """q [S, H, G, D] one query a sequence, kv_lens [S] -> out [S, H, G, D], lse [S, H, G]."""
    block_pages = max(1, _DECODE_BLOCK_KEYS // kv_pages.shape[3])
    block_keys = block_pages * kv_pages.shape[3]
    table = _pad_table(page_table, block_pages)

    def add_block(i: jax.Array, state: _Softmax) -> _Softmax:
        pages = lax.dynamic_slice_in_dim(table, i * block_pages, block_pages, axis=1)
        k, v = _gather(kv_pages, pages)
        visible = (i * block_keys + jnp.arange(block_keys, dtype=jnp.int32))[None, :] < kv_lens[:, None]
        v = jnp.where(visible[:, None, :, None], v, jnp.zeros((), v.dtype))  # a page may hold anything past its end
        return state.add(q, k, v, visible[:, None, None, :])

    num_blocks = (jnp.max(kv_lens) + block_keys - 1) // block_keys
    state: _Softmax = lax.fori_loop(0, num_blocks, add_block, _Softmax.start(q.shape[:3], q.shape[3]))
    return state.finish()


def _prefill(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    num_seqs: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """q [T, H, G, D] ragged -> out [T, H, G, D], lse [T, H, G]. num_seqs is a scalar here."""
    num_tokens, num_kv_heads, group, head_dim = q.shape
    page_size = kv_pages.shape[3]
    tile = min(_QUERY_TILE, num_tokens)
    block_pages = max(1, _PREFILL_BLOCK_KEYS // page_size)
    block_keys = block_pages * page_size
    table = _pad_table(page_table, block_pages)
    seq_ids = jnp.arange(page_table.shape[0], dtype=jnp.int32)
    q_lens = jnp.where(seq_ids < num_seqs, cu_q_lens[1:] - cu_q_lens[:-1], 0)
    tiles_end = jnp.cumsum((q_lens + tile - 1) // tile, dtype=jnp.int32)
    tiles_start = tiles_end - (q_lens + tile - 1) // tile
    q = jnp.pad(q, ((0, tile), (0, 0), (0, 0), (0, 0)))

    def attend_tile(t: jax.Array, outs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        seq = jnp.searchsorted(tiles_end, t, side="right").astype(jnp.int32)
        first = (t - tiles_start[seq]) * tile  # first query of the tile, counted in its sequence
        start = cu_q_lens[seq] + first
        rows = (
            lax.dynamic_slice_in_dim(q, start, tile).transpose(1, 0, 2, 3).reshape(num_kv_heads, tile * group, head_dim)
        )
        position = kv_lens[seq] - q_lens[seq] + first + jnp.arange(tile, dtype=jnp.int32)
        row_position = jnp.repeat(jnp.minimum(position, kv_lens[seq] - 1), group)  # [R]
        row_pages = table[seq]

        def add_block(i: jax.Array, state: _Softmax) -> _Softmax:
            k, v = _gather(kv_pages, lax.dynamic_slice_in_dim(row_pages, i * block_pages, block_pages))
            key = i * block_keys + jnp.arange(block_keys, dtype=jnp.int32)
            v = jnp.where((key < kv_lens[seq])[None, :, None], v, jnp.zeros((), v.dtype))
            return state.add(rows, k, v, key[None, None, :] <= row_position[None, :, None])

        last_key = jnp.minimum(kv_lens[seq], kv_lens[seq] - q_lens[seq] + first + tile)
        num_blocks = (last_key + block_keys - 1) // block_keys
        state = lax.fori_loop(0, num_blocks, add_block, _Softmax.start((num_kv_heads, tile * group), head_dim))
        out, lse = state.finish()
        out = out.reshape(num_kv_heads, tile, group, head_dim).transpose(1, 0, 2, 3)
        lse = lse.reshape(num_kv_heads, tile, group).transpose(1, 0, 2)
        # Rows past the sequence's end are overwritten by the tiles that follow, or lie in the padding.
        return lax.dynamic_update_slice_in_dim(outs[0], out, start, 0), lax.dynamic_update_slice_in_dim(
            outs[1], lse, start, 0
        )

    outs = (
        jnp.zeros((num_tokens + tile, num_kv_heads, group, head_dim), jnp.float32),
        jnp.zeros((num_tokens + tile, num_kv_heads, group), jnp.float32),
    )
    out, lse = lax.fori_loop(0, tiles_end[-1], attend_tile, outs)
    return out[:num_tokens], lse[:num_tokens]
