"""How one layer's pages lie in memory."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class PageLayout:
    """One layer's page array, `[num_pages, num_kv_heads, 2, page_size, head_dim]`; index 0 of axis 2 is K, 1 is V.

    A head's page is contiguous, so a gather moves whole `page_size * head_dim` rows and its result is already
    `[..., kv_head, key, head_dim]`, the order a matrix product wants; a mesh splits axis 1.

    bfloat16 is stored as uint16: XLA on the CPU upcasts a whole bfloat16 array to float32 to scatter into it.
    """

    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: jnp.dtype

    HEAD_AXIS = 1

    def __post_init__(self) -> None:
        if self.dtype not in (jnp.bfloat16, jnp.float32):
            raise ValueError(f"page dtype: expected bfloat16 or float32, got {self.dtype}")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_pages, self.num_kv_heads, 2, self.page_size, self.head_dim)

    @property
    def storage_dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.uint16) if self.dtype == jnp.bfloat16 else jnp.dtype(self.dtype)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in one layer."""
        return 2 * self.num_kv_heads * self.page_size * self.head_dim * self.storage_dtype.itemsize

    def zeros(self) -> jax.Array:
        return jnp.zeros(self.shape, self.storage_dtype)


def to_storage(values: jax.Array, kv_pages: jax.Array) -> jax.Array:
    """Values (any float dtype) as they are kept in `kv_pages`."""
    if kv_pages.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    return values.astype(kv_pages.dtype)


def from_storage(stored: jax.Array) -> jax.Array:
    """Stored values as numbers: bfloat16 or float32."""
    return jax.lax.bitcast_convert_type(stored, jnp.bfloat16) if stored.dtype == jnp.uint16 else stored
