"""The Hopper kernel compiled to machine code (LLVM and ptxas) for a card that is not there.

Runs where JAX's CUDA plugin is installed (`pip install "jax[cuda13]"`), whose compiler takes a described card; no GPU
or driver is needed. It sees what lowering does not: operands, register spills, shared memory past the limit.
"""

from __future__ import annotations

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from kernels_pallas import Geometry, gpu

PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
pytestmark = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, PLUGINS)), reason="JAX's CUDA plugin is not installed (jax[cuda13])"
)

H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_core_limit: 2048 threads_per_warp: 32
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  l2_cache_size: 62914560 device_memory_size: 150000000000 memory_bandwidth: 4800000000000
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
"""


@pytest.fixture(scope="module")
def sharding():
    jax.devices()  # registers the plugin
    topology = topologies.get_topology_desc(platform="cuda", topology_name="h200", target_config=H200, topology="1x1x1")
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_compiles_to_machine_code(sharding, head_dim, causal):
    """Decode slots and chunks in one step, and the family pass."""
    g = Geometry(
        num_tokens=512,
        num_seqs=72,
        pages_per_seq=128,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=head_dim,
        page_size=64,
        num_decode_slots=64 if causal else 0,
        page_dtype=jnp.bfloat16,
        q_dtype=jnp.bfloat16,
        causal=causal,
    )

    def layer(q, pages, table, *lengths):
        schedule = gpu.make_schedule(*lengths, geometry=g)
        how = {"causal": causal, "sm_scale": 0.1, "sliding_window": None, "soft_cap": None}
        return gpu.attend(q, pages, table, *lengths, schedule, geometry=g, **how)

    shaped = partial(jax.ShapeDtypeStruct, sharding=sharding)
    int32 = partial(shaped, dtype=jnp.int32)
    compiled = (
        jax.jit(layer)
        .lower(
            shaped((g.num_tokens, g.num_q_heads, head_dim), jnp.bfloat16),
            shaped((4096, g.num_kv_heads, 2, g.page_size, head_dim), jnp.bfloat16),
            *(int32(shape) for shape in ((g.num_seqs, g.pages_per_seq), (73,), (72,), (72,), (1,))),
        )
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 30


def test_write_is_in_place(sharding):
    """A bfloat16 scatter that touches the donated pages only."""
    shaped = partial(jax.ShapeDtypeStruct, sharding=sharding)
    pages, new = shaped((4096, 8, 2, 64, 128), jnp.bfloat16), shaped((256, 8, 128), jnp.bfloat16)
    write = jax.jit(gpu.write_kv, donate_argnums=0)
    memory = write.lower(pages, new, new, shaped((256,), jnp.int32)).compile().memory_analysis()
    assert memory.alias_size_in_bytes == pages.size * 2
    assert memory.temp_size_in_bytes < 1 << 20
