"""The static shape of one variant of the kernel: its block sizes applied to a geometry."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp

from kernels_pallas.geometry import Geometry
from kernels_pallas.tpu import blocks
from kernels_pallas.tpu.blocks import LANES, BlockSizes, Variant

_SUBLANES = 8  # of float32; 16 rows of bfloat16 share as many registers
_PREFILL_ROWS = 16


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Shapes inside the kernel. The R rows of a tile are its tokens' query heads of one key head, token after token.

    decode: one token a tile, its rows padded to whole sublanes.
    prefill: `tokens` tokens a tile, of one sequence. Sequences start at multiples of `align` tokens, so that their rows
    start where a tile of memory does.
    """

    variant: Variant
    num_kv_heads: int
    group: int
    head_dim: int
    page_size: int
    pages_per_seq: int
    tokens: int
    align: int
    block_pages: int
    buffers: int
    heads: int
    causal: bool
    compute_dtype: jnp.dtype
    page_dtype: jnp.dtype

    @classmethod
    def of(cls, geometry: Geometry, variant: Variant, sizes: BlockSizes) -> Tile:
        group, page_size = geometry.group, geometry.page_size
        align = 1 if variant == "decode" else _PREFILL_ROWS // math.gcd(_PREFILL_ROWS, group)
        num_tokens = geometry.num_tokens - geometry.num_decode_slots
        tokens = max(align, sizes.rows // group // align * align)
        # Whole registers of keys, unless fewer were asked for.
        table_pages = round_up(geometry.pages_per_seq, max(1, min(LANES, sizes.keys) // page_size))
        return cls(
            variant=variant,
            num_kv_heads=geometry.num_kv_heads,
            group=group,
            head_dim=geometry.head_dim,
            page_size=page_size,
            pages_per_seq=geometry.pages_per_seq,
            tokens=1 if variant == "decode" else min(tokens, round_up(num_tokens, align)),
            align=align,
            block_pages=min(max(1, sizes.keys // page_size), table_pages),
            buffers=sizes.buffers,
            heads=max(n for n in range(1, sizes.heads + 1) if geometry.num_kv_heads % n == 0),
            causal=geometry.causal,
            compute_dtype=jnp.dtype(geometry.q_dtype),
            page_dtype=geometry.page_dtype,
        )

    @property
    def lanes(self) -> int:
        """Of a query, a key and an output row: head_dim, or 128 where a key and its value share them."""
        return max(LANES, self.head_dim)

    @property
    def parts(self) -> int:
        """2: a key and a value are rows of their own. 1: they are halves of one row."""
        return 2 * self.head_dim // self.lanes

    @property
    def rows(self) -> int:
        return round_up(self.tokens * self.group, _SUBLANES)

    @property
    def block_keys(self) -> int:
        return self.block_pages * self.page_size

    @property
    def q_dtype(self) -> jnp.dtype:
        """In which queries travel. Decode: float32, of which 8 rows fill a tile of memory, not 16."""
        return jnp.dtype(jnp.float32) if self.variant == "decode" else self.compute_dtype

    @property
    def kv_shape(self) -> tuple[int, ...]:
        """Of the ring of key blocks."""
        page = (self.num_kv_heads, self.parts, self.page_size, self.lanes)
        return (self.buffers, self.block_pages, *page)

    def max_tiles(self, num_tokens: int, num_seqs: int) -> int:
        """The most tiles that sequences of so many tokens together can have."""
        return num_seqs if self.variant == "decode" else num_tokens // self.tokens + num_seqs

    def padded_tokens(self, num_tokens: int, num_seqs: int) -> int:
        """Tokens with every sequence aligned, and room for the last tile's rows past the end."""
        return num_tokens if self.variant == "decode" else num_tokens + num_seqs * (self.align - 1) + self.tokens

    @property
    def vmem_bytes(self) -> int:
        """An upper estimate of the kernel's VMEM: scratch, and what the scores of a step need."""
        row_bytes = 4 * self.lanes
        rows = self.num_kv_heads * self.rows
        kv = math.prod(self.kv_shape) * self.page_dtype.itemsize
        q = 2 * rows * self.lanes * self.q_dtype.itemsize
        out = 2 * rows * row_bytes + 2 * self.rows * 4 * LANES
        state = 2 * rows * 4 * LANES
        scores = 4 * self.heads * self.rows * self.block_keys * 4
        block = 2 * self.heads * self.block_keys * row_bytes
        return kv + q + out + state + scores + block


def tile_of(geometry: Geometry, variant: Variant, sizes: BlockSizes | None = None) -> Tile | None:
    """The variant's tile for this geometry, by default with the chip's block sizes; None if no sequence can need it."""
    slots = geometry.num_decode_slots
    if not (slots if variant == "decode" else geometry.num_tokens > slots and geometry.num_seqs > slots):
        return None
    return Tile.of(geometry, variant, sizes or blocks.choose(geometry, variant, blocks.current_chip()))
