"""The device arrays behind the page pool: every layer's pages, and how many of them fit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas import PageLayout
from preble_jax.config import KVSettings
from preble_jax.errors import ConfigError

_GIB = 1 << 30


def sized_layout(
    settings: KVSettings, *, num_layers: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype, num_shards: int
) -> PageLayout:
    """One layer's layout with `settings.num_pages` pages, or as many as `settings.memory_gib` holds.

    num_shards: devices over which key heads are split; the memory is that of one device.
    """
    layout = PageLayout(
        num_pages=1, page_size=settings.page_size, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype
    )
    page_bytes = layout.page_bytes * num_layers // num_shards
    num_pages = settings.num_pages or int(settings.memory_gib * _GIB) // page_bytes
    if num_pages < 2:
        raise ConfigError(
            f"kv: expected room for at least 2 pages of {page_bytes} bytes, got num_pages={settings.num_pages}, "
            f"memory_gib={settings.memory_gib}; raise one of them"
        )
    return replace(layout, num_pages=num_pages)


def pages_sharding(mesh: Mesh, heads: str | None) -> NamedSharding:
    """Key heads are split over mesh axis `heads` (None: every device holds them all)."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * PageLayout.HEAD_AXIS, heads))


def allocate_pages(layout: PageLayout, num_layers: int, sharding: NamedSharding) -> tuple[jax.Array, ...]:
    """Zeroed pages for each layer, made where they stay."""
    make = jax.jit(partial(jnp.zeros, layout.shape, layout.storage_dtype), out_shardings=sharding)
    return tuple(make() for _ in range(num_layers))
