"""How one layer's pages lie in memory, for each backend."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

PAGE_SIZES = (16, 32, 64, 128)  # on the accelerators; the jnp path takes any
_PLATFORMS = ("jnp", "cpu", "tpu", "gpu")
_TPU_LANES = 128
_KERNEL_HEAD_DIMS = (64, 128, 256)
# XLA on the CPU upcasts a whole array of these to float32 to scatter into it, so their bits are kept instead.
_STORED_AS_BITS: dict[jnp.dtype, jnp.dtype] = {
    jnp.dtype(jnp.bfloat16): jnp.dtype(jnp.uint16),
    jnp.dtype(jnp.float8_e4m3fn): jnp.dtype(jnp.uint8),
}
_BITS_OF = {bits: dtype for dtype, bits in _STORED_AS_BITS.items()}
_PAGE_DTYPES = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float32, jnp.int8, jnp.float8_e4m3fn)))


def page_dtype(stored: jnp.dtype) -> jnp.dtype:
    """The dtype of the numbers in pages whose array has dtype `stored`. ValueError where no layout stores such."""
    dtype: jnp.dtype = _BITS_OF.get(jnp.dtype(stored), jnp.dtype(stored))
    if dtype not in _PAGE_DTYPES:
        raise ValueError(
            f"kv_pages: expected an array made by a PageLayout (one of {', '.join(map(str, _PAGE_DTYPES))}, or their "
            f"bits), got {stored}"
        )
    return dtype


@dataclass(frozen=True, kw_only=True)
class PageLayout:
    """One layer's page array. Every layout leads with `[num_pages, num_kv_heads, ...]`; a mesh splits `HEAD_AXIS`.

    jnp  [num_pages, num_kv_heads, 2, page_size, head_dim], index 0 of axis 2 being K and 1 V. A head's page is
         contiguous: a gather moves whole rows of page_size * head_dim numbers, and its result already is
         [..., kv_head, key, head_dim], the order a matrix product wants. bfloat16 and fp8 are kept as their bits.
    cpu  the same.
    gpu  the same shape, native dtypes.
    tpu  [num_pages, num_kv_heads, C, page_size, lanes], lanes = max(128, head_dim), C = 2 * head_dim / lanes:
         head_dim 64 packs a key and its value side by side into 128 lanes (C = 1); 128 and 256 have K, then V (C = 2).
         Native dtypes. All heads of a page are one contiguous DMA.

    backend: a name of `kernels_pallas.BACKENDS`. dtype: bfloat16, float32, int8 or float8_e4m3fn.
    Raises ValueError for what the backend cannot hold.
    """

    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: jnp.dtype
    backend: str = "jnp"

    HEAD_AXIS = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if self.platform not in _PLATFORMS:
            raise ValueError(f"backend: expected one of {', '.join(_PLATFORMS)}, got {self.backend!r}")
        if self.dtype not in _PAGE_DTYPES:
            raise ValueError(f"page dtype: expected one of {', '.join(map(str, _PAGE_DTYPES))}, got {self.dtype}")
        for name in ("num_pages", "page_size", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.platform in ("jnp", "cpu"):
            return
        if self.page_size not in PAGE_SIZES:
            raise ValueError(
                f"page_size on {self.backend}: expected one of {PAGE_SIZES}, got {self.page_size}; "
                f"set it, or use the jnp backend"
            )
        if self.head_dim not in _KERNEL_HEAD_DIMS:
            raise ValueError(
                f"head_dim on {self.backend}: expected one of {_KERNEL_HEAD_DIMS}, got {self.head_dim}; "
                f"use the jnp backend"
            )

    @property
    def platform(self) -> str:
        """Whose packing it is: "jnp", "cpu", "tpu" or "gpu"."""
        return self.backend.removesuffix("-interpret")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        lanes = max(_TPU_LANES, self.head_dim) if self.platform == "tpu" else self.head_dim
        return (self.num_pages, self.num_kv_heads, 2 * self.head_dim // lanes, self.page_size, lanes)

    @property
    def storage_dtype(self) -> jnp.dtype:
        return _STORED_AS_BITS.get(self.dtype, self.dtype) if self.platform in ("jnp", "cpu") else self.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in one layer."""
        return 2 * self.num_kv_heads * self.page_size * self.head_dim * self.storage_dtype.itemsize

    def zeros(self) -> jax.Array:
        return jnp.zeros(self.shape, self.storage_dtype)


def to_storage(values: jax.Array, kv_pages: jax.Array) -> jax.Array:
    """Values (any float dtype) as they are kept in `kv_pages`: rounded, and clipped where the dtype has no infinity."""
    stored = jnp.dtype(kv_pages.dtype)
    dtype = page_dtype(stored)
    if dtype.itemsize == 1:
        values = values.astype(jnp.float32)
        low, high = (-127, 127) if dtype == jnp.int8 else (-448, 448)  # the largest float8_e4m3fn
        values = jnp.clip(jnp.round(values) if dtype == jnp.int8 else values, low, high)
    values = values.astype(dtype)
    return values if stored == dtype else jax.lax.bitcast_convert_type(values, stored)


def from_storage(stored: jax.Array) -> jax.Array:
    """Stored values as numbers of the page dtype."""
    dtype = page_dtype(stored.dtype)
    return stored if stored.dtype == dtype else jax.lax.bitcast_convert_type(stored, dtype)
