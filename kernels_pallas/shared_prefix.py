"""Attention of a step whose sequences share cached pages: each family's shared keys are read once.

Two passes over disjoint keys, merged by log-sum-exp: the sequences over their own suffixes, and in a second call all
families, nested ones too, whose queries are the gathered tokens of all members and who see the whole shared run.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.backends import Backend, Schedule
from kernels_pallas.families import SharedPrefixes
from kernels_pallas.geometry import Geometry
from kernels_pallas.merge import merge_rows


def attend_with_families(
    backend: Backend,
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    num_seqs: jax.Array,
    own_schedule: Schedule,
    family_schedule: Schedule | None,
    shared: SharedPrefixes | None,
    *,
    geometry: Geometry,
    sm_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See `Backend.attend` for the arguments and results; `shared` None: no families, keys from 0."""
    own = backend.attend(
        q,
        kv_pages,
        page_table,
        cu_q_lens,
        jnp.zeros_like(kv_lens) if shared is None else shared.own_starts,
        kv_lens,
        num_seqs,
        own_schedule,
        geometry=geometry,
        causal=True,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )
    if shared is None:
        return own

    put_together = getattr(backend, "merge_rows", merge_rows)  # a backend may have one of its own

    def add_families(own_out: jax.Array, own_lse: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, lse = backend.attend(
            q[shared.tokens],
            kv_pages,
            page_table[shared.table_rows],
            shared.cu_q_lens,
            shared.kv_starts,
            shared.kv_lens,
            shared.num_families,
            family_schedule,
            geometry=shared.geometry(geometry),
            causal=False,
            sm_scale=sm_scale,
            sliding_window=None,
            soft_cap=soft_cap,
        )
        merged: tuple[jax.Array, jax.Array] = put_together(own_out, own_lse, out, lse, shared.rows)
        return merged

    # A step without families pays for a branch, not for gathering and merging its queries.
    result: tuple[jax.Array, jax.Array] = lax.cond(
        shared.num_families[0] > 0, add_families, lambda out, lse: (out, lse), *own
    )
    return result
