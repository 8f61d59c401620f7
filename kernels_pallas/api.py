"""The calls the model makes. What every backend shares is done here and in `shared_prefix`; the rest is a backend's."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp

from kernels_pallas.backends import Backend, Schedule, for_pages
from kernels_pallas.families import SharedPrefixes
from kernels_pallas.geometry import Geometry
from kernels_pallas.layout import page_dtype
from kernels_pallas.shared_prefix import attend_with_families


class StepSchedule(NamedTuple):
    """A step's loops, computed once and handed to every layer. families: None for a step without `shared`."""

    own: Schedule
    families: Schedule | None


def write_kv(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    *,
    kv_scales: jax.Array | None = None,
    backend: str = "jnp",
) -> jax.Array:
    """Writes a step's new keys and values into their pages; donate `kv_pages` and nothing is copied.

    k, v [T, Hkv, D]; slots [T] int32 = page * page_size + offset in the page. A slot past the last page is padding
    and dropped. kv_scales [2, Hkv] float32, with int8 and fp8 pages alone: what K and V are divided by. Returns the
    pages. Raises ValueError, when traced, for shapes or scales that do not fit the pages.
    """
    num_heads, in_a_page = kv_pages.shape[1], kv_pages.shape[2] * kv_pages.shape[4]
    if k.shape != v.shape or k.ndim != 3 or k.shape[1] != num_heads or 2 * k.shape[2] != in_a_page:
        raise ValueError(
            f"write_kv: expected k and v of shape [T, {num_heads}, {in_a_page // 2}] for pages {kv_pages.shape}, got "
            f"{k.shape} and {v.shape}"
        )
    if slots.shape != k.shape[:1] or slots.dtype != jnp.int32:
        raise ValueError(f"slots: expected int32 {k.shape[:1]}, one a token, got {slots.dtype} {slots.shape}")
    _check_scales(kv_scales, page_dtype(kv_pages.dtype), num_heads)
    if kv_scales is not None:
        k, v = (x.astype(jnp.float32) / kv_scales[i][None, :, None] for i, x in enumerate((k, v)))
    return for_pages(backend, page_dtype(kv_pages.dtype)).write_kv(kv_pages, k, v, slots)


def make_schedule(
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    geometry: Geometry,
    shared: SharedPrefixes | None = None,
    backend: str = "jnp",
) -> StepSchedule:
    """What `paged_attention` would compute for itself in every layer. Arguments as there; a layer with a sliding
    window takes a schedule made without `shared`, because it reads its keys without families."""
    backend_ = for_pages(backend, geometry.page_dtype)
    if shared is None:
        starts = jnp.zeros_like(kv_lens)
        return StepSchedule(backend_.make_schedule(cu_q_lens, starts, kv_lens, num_seqs, geometry=geometry), None)
    shared = SharedPrefixes(*map(jnp.asarray, shared))
    own = backend_.make_schedule(cu_q_lens, shared.own_starts, kv_lens, num_seqs, geometry=geometry)
    families = backend_.make_schedule(
        shared.cu_q_lens, shared.kv_starts, shared.kv_lens, shared.num_families, geometry=shared.geometry(geometry)
    )
    return StepSchedule(own, families)


@overload
def paged_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    num_decode_slots: int = ...,
    sm_scale: float | None = ...,
    sliding_window: int | None = ...,
    soft_cap: float | None = ...,
    kv_scales: jax.Array | None = ...,
    shared: SharedPrefixes | None = ...,
    schedule: StepSchedule | None = ...,
    first_page: jax.Array | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> jax.Array: ...
@overload
def paged_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    num_decode_slots: int = ...,
    sm_scale: float | None = ...,
    sliding_window: int | None = ...,
    soft_cap: float | None = ...,
    kv_scales: jax.Array | None = ...,
    shared: SharedPrefixes | None = ...,
    schedule: StepSchedule | None = ...,
    first_page: jax.Array | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[jax.Array, jax.Array]: ...
def paged_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    num_decode_slots: int = 0,
    sm_scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    kv_scales: jax.Array | None = None,
    shared: SharedPrefixes | None = None,
    schedule: StepSchedule | None = None,
    first_page: jax.Array | None = None,
    return_lse: bool = False,
    backend: str = "jnp",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal attention of a ragged batch over pages that already hold the step's own keys and values.

    q          [T, Hq, D]            the batch's tokens, sequence after sequence, padded at the end
    kv_pages   one layer's pages     made by a `PageLayout` for the same backend
    page_table [S, pages_per_seq]    int32; entry j of a row covers keys j * page_size and on
    cu_q_lens  [S + 1]               int32; sequence s owns tokens cu_q_lens[s] : cu_q_lens[s + 1]
    kv_lens    [S]                   int32; keys of the sequence, its own new ones too: the last query sees all
    num_seqs   [1]                   int32; rows from there on are ignored
    kv_scales  [2, Hkv]              float32, with int8 and fp8 pages: what stored keys and values are multiplied by

    num_decode_slots (static): the first so many sequences own exactly one token each, token i being sequence i's; a
    slot with kv_lens 0 is empty. They take a path without query tiles.
    sliding_window (static): a query sees so many keys, its own included. soft_cap (static): scores become
    soft_cap * tanh(scores / soft_cap). sm_scale (static): default 1 / sqrt(D).
    shared: the step's families (`FamilyPlanner`): their pages are read once a family, with the same result. A
    layer with a sliding window reads without it.
    schedule: of `make_schedule` for the same arrays, so that layers need not compute it again.
    first_page [] int32: which of the pages the table calls 0, where `kv_pages` holds several layers', one after the
    other; None: 0.

    Returns out [T, Hq, D] in q's dtype and, when asked, lse [T, Hq] float32: the natural logarithm of the sum of
    exp(scores). A query that sees no key gets zeros and -inf. Tokens past the last sequence are undefined but finite.
    Raises ValueError, when traced, for shapes that do not fit together and for what the backend cannot serve.
    """
    geometry = Geometry.from_arrays(q, kv_pages, page_table, num_decode_slots=num_decode_slots)
    _check_lengths(geometry, cu_q_lens, kv_lens, num_seqs, page_table)
    _check_numbers(sm_scale, sliding_window, soft_cap)
    _check_scales(kv_scales, geometry.page_dtype, geometry.num_kv_heads)
    backend_ = for_pages(backend, geometry.page_dtype)
    backend_.check(geometry, sliding_window=sliding_window, soft_cap=soft_cap)
    families = None if shared is None or sliding_window else SharedPrefixes(*map(jnp.asarray, shared))
    if schedule is None:
        schedule = make_schedule(cu_q_lens, kv_lens, num_seqs, geometry=geometry, shared=families, backend=backend)
    elif (schedule.families is None) != (families is None):
        raise ValueError("schedule: expected one made with the same `shared`, and without it where a window is set")
    if first_page is not None:
        page_table, schedule = _starting_at(backend_, page_table, schedule, first_page)
    queries = q
    if kv_scales is not None:
        k_scale, v_scale = (jnp.repeat(scale, geometry.group)[None, :, None] for scale in kv_scales)
        queries = (q.astype(jnp.float32) * k_scale).astype(q.dtype)
    out, lse = attend_with_families(
        backend_,
        queries,
        kv_pages,
        page_table,
        cu_q_lens,
        kv_lens,
        num_seqs,
        schedule.own,
        schedule.families,
        families,
        geometry=geometry,
        sm_scale=1.0 / math.sqrt(geometry.head_dim) if sm_scale is None else sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )
    if kv_scales is not None:
        out = out * v_scale
    rounded = getattr(backend_, "rounded", None)  # a backend whose queries are bfloat16 may have its own
    out = out.astype(q.dtype) if rounded is None else rounded(out)
    return (out, lse) if return_lse else out


def _starting_at(
    backend: Backend, page_table: jax.Array, schedule: StepSchedule, first_page: jax.Array
) -> tuple[jax.Array, StepSchedule]:
    starting_at = getattr(backend, "starting_at", None)  # a backend whose kernel can add: the table is large
    if starting_at is None:
        return page_table + first_page, schedule
    families = None if schedule.families is None else starting_at(schedule.families, first_page)
    return page_table, StepSchedule(starting_at(schedule.own, first_page), families)


def _check_lengths(
    geometry: Geometry, cu_q_lens: jax.Array, kv_lens: jax.Array, num_seqs: jax.Array, page_table: jax.Array
) -> None:
    seqs = geometry.num_seqs
    for name, array, shape in (
        ("cu_q_lens", cu_q_lens, (seqs + 1,)),
        ("kv_lens", kv_lens, (seqs,)),
        ("num_seqs", num_seqs, (1,)),
        ("page_table", page_table, (seqs, geometry.pages_per_seq)),
    ):
        if array.shape != shape or array.dtype != jnp.int32:
            raise ValueError(f"{name}: expected int32 {shape}, got {array.dtype} {array.shape}")


def _check_numbers(sm_scale: float | None, sliding_window: int | None, soft_cap: float | None) -> None:
    if sm_scale is not None and not (math.isfinite(sm_scale) and sm_scale > 0):
        raise ValueError(f"sm_scale: expected a positive number or None, got {sm_scale}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window: expected at least 1 key or None, got {sliding_window}")
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        raise ValueError(f"soft_cap: expected a positive number or None, got {soft_cap}")


def _check_scales(kv_scales: jax.Array | None, pages: jnp.dtype, num_kv_heads: int) -> None:
    """pages: the dtype of their numbers; those of one byte have scales, others none."""
    quantised = pages.itemsize == 1
    if quantised != (kv_scales is not None):
        raise ValueError(
            f"kv_scales: expected {'scales' if quantised else 'none'} with {pages} pages, got "
            f"{'none' if kv_scales is None else 'scales'}"
        )
    if kv_scales is None:
        return
    if kv_scales.shape != (2, num_kv_heads) or kv_scales.dtype != jnp.float32:
        raise ValueError(
            f"kv_scales: expected float32 {(2, num_kv_heads)}, for K and V a scale for each key head, got "
            f"{kv_scales.dtype} {kv_scales.shape}"
        )
