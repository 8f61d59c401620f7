"""The Hopper kernel lowers for CUDA on a machine without one, at production shapes, and refuses what it cannot do.

Lowering runs Mosaic GPU's own checks (layouts, tilings, swizzles, barriers); without a card it assumes compute
capability 9.0. It does not run ptxas.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import Geometry, gpu
from kernels_pallas.gpu.blocks import DECODE, SMEM_BYTES, TILES
from kernels_pallas.gpu.schedule import launches

LLAMA_8B = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
LLAMA_70B_OF_8 = {"num_q_heads": 8, "num_kv_heads": 1, "head_dim": 128}  # one of eight cards
SMALL = {"num_q_heads": 9, "num_kv_heads": 3, "head_dim": 64}
WIDE = {"num_q_heads": 16, "num_kv_heads": 8, "head_dim": 256}
DECODE_STEP = {"num_tokens": 256, "num_seqs": 256, "num_decode_slots": 256}
CHUNKS = {"num_tokens": 2048, "num_seqs": 8, "num_decode_slots": 0}
MIXED = {"num_tokens": 2048, "num_seqs": 256, "num_decode_slots": 248}


def geometry(context=8192, page_size=64, **kw):
    kw = {"page_dtype": jnp.bfloat16, "q_dtype": jnp.bfloat16, **kw}
    return Geometry(pages_per_seq=context // page_size, page_size=page_size, **kw)


def lower(g, *, sliding_window=None, soft_cap=None):
    """The whole of a layer's attention, schedule and merge included, as StableHLO for CUDA."""
    int32 = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    lengths = [int32((g.num_seqs + 1,)), int32((g.num_seqs,)), int32((g.num_seqs,)), int32((1,))]
    pages = jax.ShapeDtypeStruct((4096, g.num_kv_heads, 2, g.page_size, g.head_dim), g.page_dtype)
    q = jax.ShapeDtypeStruct((g.num_tokens, g.num_q_heads, g.head_dim), g.q_dtype)

    def layer(q, pages, table, *lengths):
        schedule = gpu.make_schedule(*lengths, geometry=g)
        how = {"causal": g.causal, "sm_scale": 0.1, "sliding_window": sliding_window, "soft_cap": soft_cap}
        return gpu.attend(q, pages, table, *lengths, schedule, geometry=g, **how)

    traced = jax.jit(layer).trace(q, pages, int32((g.num_seqs, g.pages_per_seq)), *lengths)
    assert [x.shape for x in jax.tree.leaves(traced.out_info)] == [q.shape, q.shape[:2]]
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("shape", "num_kernels"),
    [
        ({**LLAMA_8B, **DECODE_STEP}, 1),
        ({**LLAMA_8B, **CHUNKS, "context": 32768, "page_size": 16}, 1),
        ({**LLAMA_70B_OF_8, **MIXED, "page_size": 128}, 2),
        ({**LLAMA_8B, "num_tokens": 512, "num_seqs": 128, "num_decode_slots": 0, "causal": False}, 1),
        ({**SMALL, **MIXED, "page_size": 16, "q_dtype": jnp.float32}, 2),
        ({**WIDE, **MIXED, "page_size": 32}, 2),
    ],
    ids=["8B decode", "8B chunks", "70B mixed", "8B families", "64 wide, mixed, float32", "256 wide, mixed"],
)
def test_lowers_for_cuda(shape, num_kernels):
    text = lower(geometry(**shape))
    assert text.count("@mosaic_gpu_v2") == num_kernels


def test_lowers_with_window_and_soft_cap():
    assert "@mosaic_gpu_v2" in lower(geometry(**LLAMA_8B, **MIXED), sliding_window=4096, soft_cap=50.0)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("blocks", [DECODE, TILES], ids=["decode", "tiles"])
def test_blocks_fit(blocks, head_dim):
    row = blocks[head_dim]
    assert row.smem_bytes(head_dim) <= SMEM_BYTES
    assert 128 * (row.num_consumers * row.registers[0] + row.registers[1]) <= 65536, "registers of a multiprocessor"
    assert not row.split_keys or row.num_stages % row.num_consumers == 0, "a slot must always be the same consumer's"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 96}, "head_dim on gpu: expected one of .64, 128, 256., got 96"),
        ({"page_size": 8}, "page_size on gpu: expected one of .16, 32, 64, 128., got 8"),
        ({"page_dtype": jnp.int8}, "pages on gpu: expected bfloat16 .* got int8; use the jnp backend"),
        ({"page_dtype": jnp.float32}, "pages on gpu: expected bfloat16 .* got float32"),
        ({"num_q_heads": 8 * 129}, "query heads a key head on gpu: expected at most 128 .* got 129"),
    ],
)
def test_limits_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        gpu.check(geometry(**{**LLAMA_8B, **MIXED, **change}), sliding_window=None, soft_cap=None)


def test_other_limits_are_named():
    g = geometry(**LLAMA_8B, **CHUNKS, causal=False)
    with pytest.raises(ValueError, match="sliding_window: expected at least 1 key, in causal attention, got 4 with"):
        gpu.check(g, sliding_window=4, soft_cap=None)
    with pytest.raises(ValueError, match="soft_cap: expected a positive number, got 0"):
        gpu.check(g, sliding_window=None, soft_cap=0.0)


def test_a_group_wider_than_a_warpgroup_decodes_as_tiles():
    g = geometry(num_q_heads=71, num_kv_heads=1, head_dim=64, num_tokens=4, num_seqs=4, num_decode_slots=4)
    (launch,) = launches(g)
    assert not launch.blocks.split_keys and launch.tile_tokens == 1
