"""Writes a step's new keys and values into the pages, in place.

Memory on a TPU is tiled: a single bfloat16 row cannot be copied into a page. So the kernel reads the aligned group of
rows around it (16 of bfloat16, 8 of float32, 32 of the 8-bit types, of all key heads), replaces its rows, and writes
the group back. Tokens that follow each other in one group, as a prompt chunk's do, are one run: read and written once.

Runs are pipelined: reads go out `_AHEAD` runs early and writes come back late. A run whose group one of the runs around
it still has in hand starts a new segment of the pipeline, after everything before it has been written.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.layout import to_storage
from kernels_pallas.tpu import blocks
from kernels_pallas.tpu.tiles import round_up

Ref = Any
Scalar = Any

_AHEAD = 8
_BUFFERS = 2 * _AHEAD
_CHUNK_TOKENS = 256


class Runs(NamedTuple):
    """Tokens in consecutive slots of one group of rows. N runs at most, all int32.

    chunk [chunks + 1]: the first run of each chunk of tokens. token, slot, length [N]: of a run's first token, and its
    number of tokens. segment_end [N]: the first run after it that must wait for all before.
    """

    chunk: jax.Array
    token: jax.Array
    slot: jax.Array
    length: jax.Array
    segment_end: jax.Array


class Refs(NamedTuple):
    # scalar prefetch, in SMEM: see Runs
    chunk: Ref
    token: Ref
    slot: Ref
    length: Ref
    segment_end: Ref
    # inputs
    new: Ref  # [H, parts, chunk tokens, L], in VMEM
    pages_in: Ref  # the same memory as `pages`
    # output
    pages: Ref  # [P, H, parts, page_size, L], in HBM
    # scratch
    groups: Ref  # [buffers, H, parts, group rows, L], in VMEM
    read: Ref  # [buffers] DMA semaphores
    written: Ref  # [buffers]


def write_kv(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """See `kernels_pallas.write_kv`. Slots are distinct, but for those past the last page."""
    num_tokens = k.shape[0]
    num_pages, num_heads, parts, page_size, lanes = kv_pages.shape
    tile_rows = 32 // kv_pages.dtype.itemsize
    group_rows = min(tile_rows, page_size)
    chunk_tokens = min(_CHUNK_TOKENS, round_up(num_tokens, 2 * tile_rows))
    num_chunks = pl.cdiv(num_tokens, chunk_tokens)
    _check_smem(4 * (4 * num_tokens + num_chunks + 1), num_tokens)
    runs = _find_runs(slots, num_pages * page_size, group_rows, chunk_tokens)
    new = jnp.concatenate([k, v], axis=-1).reshape(num_tokens, num_heads, parts, lanes)
    new = jnp.pad(new, ((0, num_chunks * chunk_tokens - num_tokens), (0, 0), (0, 0), (0, 0)))
    new = to_storage(new.transpose(1, 2, 0, 3), kv_pages)
    return pl.pallas_call(  # type: ignore[no-any-return]
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(runs),
            grid=(num_chunks,),
            in_specs=[
                pl.BlockSpec((num_heads, parts, chunk_tokens, lanes), lambda i, *_: (0, 0, i, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((_BUFFERS, num_heads, parts, group_rows, lanes), kv_pages.dtype),
                pltpu.SemaphoreType.DMA((_BUFFERS,)),
                pltpu.SemaphoreType.DMA((_BUFFERS,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype),
        input_output_aliases={len(runs) + 1: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=blocks.current_chip().vmem_budget
        ),
        interpret=blocks.interpret_params(interpret),
        name="write_kv",
    )(*runs, new, kv_pages)


def _check_smem(needed: int, num_tokens: int) -> None:
    limit = blocks.current_chip().smem_budget
    if needed > limit:
        raise ValueError(
            f"write_kv: the runs of {num_tokens} tokens need {needed} bytes of SMEM, more than the {limit} that they "
            f"may take; write fewer tokens a step"
        )


def _find_runs(slots: jax.Array, num_slots: int, group_rows: int, chunk_tokens: int) -> Runs:
    size = slots.shape[0]
    token = jnp.arange(size, dtype=jnp.int32)
    live = (slots >= 0) & (slots < num_slots)
    follows = jnp.concatenate([jnp.zeros(1, bool), live[:-1] & (slots[1:] == slots[:-1] + 1)])
    begins = live & ~(follows & (slots % group_rows != 0) & (token % chunk_tokens != 0))
    run = jnp.cumsum(begins, dtype=jnp.int32) - 1
    target = jnp.where(begins, run, size)
    first_token, first_slot = (jnp.zeros(size, jnp.int32).at[target].set(x, mode="drop") for x in (token, slots))
    length = jnp.zeros(size, jnp.int32).at[jnp.where(live, run, size)].add(1, mode="drop")
    chunk_ends = jnp.arange(0, size + chunk_tokens, chunk_tokens, dtype=jnp.int32)
    chunk = jnp.sum(begins[None, :] & (token[None, :] < chunk_ends[:, None]), axis=1, dtype=jnp.int32)

    # A segment ends where a chunk does, or before a run whose group is one of those that may be in hand.
    group, chunk_of = first_slot // group_rows, first_token // chunk_tokens
    waits = jnp.zeros(size, bool)
    for distance in range(1, min(_BUFFERS, size)):
        same = (group[distance:] == group[:-distance]) & (chunk_of[distance:] == chunk_of[:-distance])
        waits |= jnp.pad(same, (distance, 0))
    barrier = jnp.where(waits, token, size)  # here `token` counts runs
    after = jnp.concatenate([barrier[1:], jnp.full(1, size, jnp.int32)])
    segment_end = lax.cummin(after, reverse=True)
    return Runs(chunk, first_token, first_slot, length, jnp.minimum(segment_end, chunk[chunk_of + 1]))


def _kernel(*refs: Ref) -> None:
    r = Refs(*refs)
    chunk = pl.program_id(0)
    last = r.chunk[chunk + 1]

    def segment(first: Scalar) -> Scalar:
        end = r.segment_end[first]
        _write_segment(r, first, end)
        return end

    lax.while_loop(lambda first: first < last, segment, r.chunk[chunk])


def _write_segment(r: Refs, first: Scalar, end: Scalar) -> None:
    """Runs [first, end), no two of which in hand at once share a group."""

    def start_read(run: Scalar) -> None:
        @pl.when(run < end)
        def _() -> None:
            @pl.when(run - _BUFFERS >= first)
            def _() -> None:
                _write_copy(r, run - _BUFFERS).wait()

            _read_copy(r, run).start()

    def step(run: Scalar, _: None) -> None:
        start_read(run + _AHEAD)
        _read_copy(r, run).wait()
        _replace_rows(r, run)
        _write_copy(r, run).start()

    def wait(run: Scalar, _: None) -> None:
        _write_copy(r, run).wait()

    for i in range(_AHEAD):
        start_read(first + i)
    lax.fori_loop(first, end, step, None)
    lax.fori_loop(jnp.maximum(first, end - _BUFFERS), end, wait, None)


def _group(r: Refs, run: Scalar) -> Any:
    """The rows in HBM."""
    page_size, group_rows = r.pages.shape[3], r.groups.shape[3]
    slot = r.slot[run]
    row = pl.multiple_of(slot % page_size // group_rows * group_rows, group_rows)
    return r.pages.at[slot // page_size, :, :, pl.ds(row, group_rows)]


def _read_copy(r: Refs, run: Scalar) -> Any:
    slot = run % _BUFFERS
    return pltpu.make_async_copy(_group(r, run), r.groups.at[slot], r.read.at[slot])


def _write_copy(r: Refs, run: Scalar) -> Any:
    slot = run % _BUFFERS
    return pltpu.make_async_copy(r.groups.at[slot], _group(r, run), r.written.at[slot])


def _replace_rows(r: Refs, run: Scalar) -> None:
    """Turns a window of new rows until the run's first one is at its place in the group, and keeps the others."""
    num_heads, parts, chunk_tokens, lanes = r.new.shape
    group_rows, tile_rows = r.groups.shape[3], 32 // r.new.dtype.itemsize
    window = 2 * tile_rows
    token, offset = r.token[run] % chunk_tokens, r.slot[run] % group_rows
    base = pl.multiple_of(jnp.minimum(token // tile_rows * tile_rows, chunk_tokens - window), tile_rows)
    new = _to_float32(r.new[:, :, pl.ds(base, window)]).reshape(num_heads * parts, window, lanes)
    new = pltpu.roll(new, (base - token + offset + window) % window, 1)[:, :group_rows]
    row = lax.broadcasted_iota(jnp.int32, new.shape, 1)
    old = _to_float32(r.groups[run % _BUFFERS]).reshape(new.shape)
    kept = jnp.where((row >= offset) & (row < offset + r.length[run]), new, old)
    r.groups[run % _BUFFERS] = _from_float32(kept.reshape(r.groups.shape[1:]), r.groups.dtype)


def _to_float32(x: jax.Array) -> jax.Array:
    """To be moved about: 32-bit rows can be turned. 8-bit floats pass as integers, which every generation converts."""
    return (pltpu.bitcast(x, jnp.int8) if x.dtype.itemsize == 1 else x).astype(jnp.float32)


def _from_float32(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return pltpu.bitcast(x.astype(jnp.int8), dtype) if dtype.itemsize == 1 else x.astype(dtype)
