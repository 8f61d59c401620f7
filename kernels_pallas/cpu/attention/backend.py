"""What surrounds the kernel: limits, and the call."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.cpu.attention.kernel import AttentionKernel
from kernels_pallas.cpu.attention.schedule import TILE_ROWS, Tiles, tile_tokens
from kernels_pallas.cpu.bf16 import LANES
from kernels_pallas.cpu.call import call_kernel
from kernels_pallas.geometry import Geometry
from kernels_pallas.jnp_attention import write_kv

__all__ = ["attend", "check", "write_kv"]

MAX_HEAD_DIM = 256  # scratch of a work item is on a thread's stack


def check(geometry: Geometry, *, sliding_window: int | None, soft_cap: float | None) -> None:
    """Raises ValueError, naming the limit, for what the kernel cannot do. At trace time."""
    dim = geometry.head_dim
    if dim % LANES or dim > MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim on cpu: expected a multiple of {LANES} up to {MAX_HEAD_DIM}, got {dim}; use the jnp backend"
        )
    for name, dtype in (("pages", geometry.page_dtype), ("queries", geometry.q_dtype)):
        if dtype != jnp.bfloat16:
            raise ValueError(f"{name} on cpu: expected bfloat16, got {dtype}; use the jnp backend")
    if geometry.group > TILE_ROWS:
        raise ValueError(
            f"query heads a key head on cpu: expected at most {TILE_ROWS}, got {geometry.group}; use the jnp backend"
        )
    if sliding_window is not None and not geometry.causal:
        raise ValueError("sliding_window: expected causal attention")


def attend(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    kv_starts: jax.Array,
    kv_lens: jax.Array,
    num_seqs: jax.Array,
    schedule: Tiles,
    *,
    geometry: Geometry,
    causal: bool,
    sm_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.backends.Attend`. Products take bfloat16 operands and sum in float32."""
    del cu_q_lens, kv_starts, kv_lens, num_seqs  # all of it is in the schedule
    check(geometry, sliding_window=sliding_window, soft_cap=soft_cap)
    if causal != geometry.causal:
        raise ValueError(f"causal: the schedule was made for {geometry.causal}, got {causal}")
    kernel = AttentionKernel(
        num_kv_heads=geometry.num_kv_heads,
        group=geometry.group,
        head_dim=geometry.head_dim,
        page_size=geometry.page_size,
        tile_tokens=tile_tokens(geometry),
        causal=causal,
        sm_scale=float(sm_scale),
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )
    out, lse = call_kernel(
        kernel,
        (q, kv_pages, page_table, schedule.table, schedule.sizes, schedule.first_page),
        (jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct(q.shape[:2], jnp.float32)),
    )
    return out, lse
