"""What surrounds the kernel: limits, the layout of queries, the merge of partial results, the write of new keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.geometry import Geometry
from kernels_pallas.gpu.blocks import DECODE, TILES, WGMMA_ROWS
from kernels_pallas.gpu.kernel import Task, attend_items
from kernels_pallas.gpu.schedule import Items, Launch, launches
from kernels_pallas.layout import PAGE_SIZES


def check(geometry: Geometry, *, sliding_window: int | None, soft_cap: float | None) -> None:
    """Raises ValueError, naming the limit, for what the Hopper kernel cannot do. At trace time."""
    if geometry.head_dim not in DECODE:
        raise ValueError(
            f"head_dim on gpu: expected one of {tuple(DECODE)}, got {geometry.head_dim}; use the jnp backend"
        )
    if geometry.page_size not in PAGE_SIZES:
        raise ValueError(f"page_size on gpu: expected one of {PAGE_SIZES}, got {geometry.page_size}")
    if geometry.page_dtype != jnp.bfloat16:
        raise ValueError(
            f"pages on gpu: expected bfloat16 (what wgmma multiplies), got {geometry.page_dtype}; use the jnp backend"
        )
    most = TILES[geometry.head_dim].tile_rows
    if geometry.group > most:
        raise ValueError(
            f"query heads a key head on gpu: expected at most {most} (a tile's rows), got {geometry.group}; "
            f"use the jnp backend"
        )
    if sliding_window is not None and (sliding_window < 1 or not geometry.causal):
        raise ValueError(
            f"sliding_window: expected at least 1 key, in causal attention, got {sliding_window} with "
            f"causal={geometry.causal}"
        )
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap: expected a positive number, got {soft_cap}")


def attend(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    kv_starts: jax.Array,
    kv_lens: jax.Array,
    num_seqs: jax.Array,
    schedule: list[Items],
    *,
    geometry: Geometry,
    causal: bool,
    sm_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.backends.Attend`. Products take bfloat16 operands (queries are cast) and sum in float32."""
    del cu_q_lens, kv_starts, kv_lens, num_seqs  # all of it is in the schedule
    check(geometry, sliding_window=sliding_window, soft_cap=soft_cap)
    if causal != geometry.causal:
        raise ValueError(f"causal: the schedule was made for {geometry.causal}, got {causal}")
    if sm_scale <= 0:
        raise ValueError(f"sm_scale: expected a positive number, got {sm_scale}")
    if kv_pages.dtype != jnp.bfloat16:
        raise ValueError(f"kv_pages on gpu: expected bfloat16, got {kv_pages.dtype}; make a PageLayout(backend='gpu')")
    outs, lses = [], []
    for launch, items in zip(launches(geometry), schedule, strict=True):
        split = launch.blocks.split_keys
        task = Task(
            blocks=launch.blocks,
            group=geometry.group,
            head_dim=geometry.head_dim,
            page_size=geometry.page_size,
            num_kv_heads=geometry.num_kv_heads,
            max_items=launch.max_items,
            rows_kept=launch.tile_stride if split else WGMMA_ROWS,
            causal=causal,
            sm_scale=sm_scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            interpret=interpret,
        )
        parts = attend_items(task, items.table, items.num_items, page_table, _rows(q, items, geometry), kv_pages)
        out, lse = _merge_parts(launch, items, *parts)
        outs.append(out)
        lses.append(lse)
    missing = geometry.num_tokens - sum(out.shape[0] for out in outs)
    if missing:  # tokens beyond the decode slots, of no sequence
        outs.append(jnp.zeros((missing, *q.shape[1:]), jnp.float32))
        lses.append(jnp.full((missing, q.shape[1]), -jnp.inf, jnp.float32))
    return jnp.concatenate(outs), jnp.concatenate(lses)


def _rows(q: jax.Array, items: Items, geometry: Geometry) -> jax.Array:
    """q [T, Hq, D] -> [Hkv, num_rows, D] bfloat16: a key head's rows together, in the order of the launch's tiles."""
    token, head = items.source // geometry.group, items.source % geometry.group
    rows = q.reshape(geometry.num_tokens, geometry.num_kv_heads, geometry.group, geometry.head_dim)[token, :, head]
    return rows.transpose(1, 0, 2).astype(jnp.bfloat16)


def _merge_parts(launch: Launch, items: Items, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The kernel's parts -> out [tokens, Hq, D], lse [tokens, Hq] of the launch.

    A row's parts are those of its tile's items, at most max_splits, and in each of these those of the consumers that
    shared its keys. Weights come from the small lse first, so that what is left is one gather summed as it is read.
    """
    geometry, blocks = launch.geometry, launch.blocks
    heads, group = geometry.num_kv_heads, geometry.group

    def axis(size: int, position: int) -> jax.Array:
        return jnp.arange(size, dtype=jnp.int32).reshape([-1 if i == position else 1 for i in range(5)])

    # Axes: split, part of an item, token, key head, head of the group.
    split = axis(launch.max_splits, 0)
    row = items.row[:, None, None] + axis(group, 4)
    consumer = axis(blocks.parts_per_item, 1) + row // WGMMA_ROWS
    item = jnp.minimum(items.first_item[:, None, None] + split, launch.max_items - 1)
    where = (item, axis(heads, 3), consumer, row % WGMMA_ROWS)
    exists = split < items.num_splits[:, None, None]
    lses = jnp.where(exists, lse[where], -jnp.inf)
    peak = lses.max(axis=(0, 1))
    seen = peak > -jnp.inf
    weights = jnp.exp(lses - jnp.where(seen, peak, 0.0))
    total = jnp.where(seen, weights.sum(axis=(0, 1)), 1.0)
    weights = weights / total
    merged = jnp.where(exists[..., None], out[where] * weights[..., None], 0.0).sum(axis=(0, 1))
    merged_lse = jnp.where(seen, peak + jnp.log(total), -jnp.inf)
    return merged.reshape(-1, heads * group, geometry.head_dim), merged_lse.reshape(-1, heads * group)


def write_kv(
    kv_pages: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """See `kernels_pallas.backends.WriteKV`. XLA's scatter: in place when donated, and a step writes few rows."""
    del interpret  # nothing to interpret
    num_pages, num_heads, _, page_size, head_dim = kv_pages.shape
    page, offset = slots // page_size, slots % page_size
    head, half = jnp.arange(num_heads, dtype=jnp.int32), jnp.arange(2, dtype=jnp.int32)
    block = (page[:, None, None] * num_heads + head[None, :, None]) * 2 + half[None, None, :]
    rows = block * page_size + offset[:, None, None]  # [T, H, 2]
    values = jnp.stack([k, v], axis=2).astype(kv_pages.dtype)  # [T, H, 2, D]
    flat = kv_pages.reshape(num_pages * num_heads * 2 * page_size, head_dim)
    return flat.at[rows].set(values, mode="drop", unique_indices=True).reshape(kv_pages.shape)
