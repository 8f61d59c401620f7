"""Block sizes: every entry fits its chip, whatever the heads; what the search reads in a compiler's schedule."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import Geometry, PageLayout
from kernels_pallas.tpu import blocks, search, write_kv
from kernels_pallas.tpu.blocks import BlockSizes, Chip
from kernels_pallas.tpu.tiles import Tile

MIB = 2**20


def chip(version: pltpu.ChipVersion) -> Chip:
    info = pltpu.get_tpu_info_for_chip(version, 1)
    return Chip(generation=str(version), vmem_bytes=info.vmem_capacity_bytes, smem_bytes=info.smem_capacity_bytes)


CHIPS = [chip(version) for version in (pltpu.ChipVersion.TPU_V5E, pltpu.ChipVersion.TPU_V6E, pltpu.ChipVersion.TPU_7X)]


def geometry(**changes):
    of = {
        "num_tokens": 2304,
        "num_seqs": 264,
        "pages_per_seq": 128,
        "num_q_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "page_size": 64,
        "num_decode_slots": 256,
        "page_dtype": jnp.bfloat16,
        "q_dtype": jnp.bfloat16,
    }
    return Geometry(**of | changes)


@pytest.mark.parametrize("of", CHIPS, ids=lambda of: of.generation)
@pytest.mark.parametrize("variant", ["decode", "prefill"])
def test_every_entry_fits_at_production_shapes(of, variant):
    heads = [(32, 8), (64, 8), (9, 3), (32, 32), (8, 1), (64, 1)]
    dtypes = [jnp.bfloat16, jnp.float32, jnp.int8, jnp.float8_e4m3fn]
    for head_dim, page_dtype, (num_q, num_kv), page_size in itertools.product((64, 128, 256), dtypes, heads, (16, 128)):
        for q_dtype in (jnp.bfloat16, jnp.float32):
            made = geometry(
                num_q_heads=num_q,
                num_kv_heads=num_kv,
                head_dim=head_dim,
                page_dtype=page_dtype,
                q_dtype=q_dtype,
                page_size=page_size,
            )
            tile = Tile.of(made, variant, blocks.choose(made, variant, of))
            assert tile.vmem_bytes <= of.vmem_budget, (tile, tile.vmem_bytes // MIB)
            assert tile.rows % 8 == 0 and tile.block_keys % 128 == 0 and num_kv % tile.heads == 0
            assert variant == "decode" or tile.tokens % tile.align == 0 == tile.align * tile.group % 16


def test_a_generation_without_entries_takes_the_cautious_ones():
    v4 = chip(pltpu.ChipVersion.TPU_V4)
    assert blocks.choose(geometry(), "prefill", v4) == BlockSizes(rows=256, keys=256, buffers=2, heads=1)


def test_many_key_heads_take_smaller_blocks():
    of_8, of_32 = (geometry(num_q_heads=n, num_kv_heads=n) for n in (8, 32))
    for variant, what in (("prefill", "rows"), ("decode", "keys")):
        sizes = [getattr(blocks.choose(g, variant, CHIPS[1]), what) for g in (of_8, of_32)]
        assert sizes[0] == 4 * sizes[1]


def test_one_buffer_is_refused():
    with pytest.raises(ValueError, match="at least 2 buffers"):
        BlockSizes(rows=8, keys=128, buffers=1, heads=1)


def test_compiling_for_something_else_is_refused():
    pages = PageLayout(
        num_pages=1, page_size=16, num_kv_heads=1, head_dim=128, dtype=jnp.bfloat16, backend="tpu"
    ).zeros()
    k = jnp.zeros((1, 1, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="expected a TPU that JAX knows"):
        write_kv(pages, k, k, jnp.zeros(1, jnp.int32))


SCHEDULE = """
= control target key start
LB: loop body
     0   :  { %s0 = smov.u32 0 }
   0x10 LB: > { %v1 = vld [vmem:[%s1] sm:$0xff] }
   0x11   : >> { %s2 = sadd.s32 1, %s2 }
   0x20 LB: >> { %s3 = sld [smem:[#allocation2]] }
   0x21   : >> { %s3 = sadd.s32 1, %s3 }
   0x22 LB: >>> { %s4 = dma }
   0x23   : >>> { %s5 = sbr }
   0x24   :  {}
   0x30 LB: >>> { %s6 = dma.done }
   0x40 LB: >>> { %v7 = clear }
   0x41   : >> { %v8 = vmatmul }
   0x50 LB: >>> { %v9 = masked }
   0x51   : >>> { %v9 = masked }
   0x60 LB: >>> { %v10 = unmasked }
   0x70   : >> { %v11 = end }
   0x80 LB: >> { %v12 = finish }
"""


def test_the_search_counts_a_block():
    sizes = BlockSizes(rows=128, keys=512, buffers=2, heads=1)
    prefill = Tile.of(geometry(), "prefill", sizes)
    # 4 bundles of the block, (3 + 1) for each of 8 pages, and the last loop for each of 8 heads, by head.
    assert search.bundles_of_a_block(SCHEDULE, prefill) == (4 + 4 * 8 + 1 * 8) / 8
    decode = Tile.of(geometry(), "decode", BlockSizes(rows=8, keys=512, buffers=2, heads=8))
    assert search.bundles_of_a_block(SCHEDULE, decode) == 4 + 4 * 8
