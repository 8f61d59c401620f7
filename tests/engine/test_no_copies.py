"""No step copies the pages: they are gigabytes, and updating a few tokens of them must not cost more than that.

Seen in what the compiler says of each program: the pages of all layers go out in the memory in which they came in, and
the room for everything in between is smaller than one layer's pages.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

NUM_PAGES = 16_384  # 32 MiB a layer in bfloat16, many times what a step of this model needs besides


@pytest.mark.parametrize(("dtype", "tensor"), [("bfloat16", 1), ("float32", 2)])
def test_every_program_updates_the_pages_in_place(make_engine, dtype: str, tensor: int) -> None:
    engine = make_engine(num_pages=NUM_PAGES, dtype=dtype, tensor=tensor, max_num_seqs=8, decode_buckets=(8,))
    all_bytes = sum(pages.nbytes for pages in engine.runner.pages) // tensor
    layer_bytes = all_bytes // len(engine.runner.params["layers"])
    programs = engine.runner.programs
    assert len(programs) >= 2
    for shape, program in programs.items():
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= all_bytes, shape
        assert memory.temp_size_in_bytes < layer_bytes / 2, (
            f"{shape}: {memory.temp_size_in_bytes} bytes in between, one layer's pages are {layer_bytes}"
        )


def test_a_copy_would_be_seen() -> None:
    """XLA on the CPU scatters into bfloat16 by way of a float32 copy, which is why pages are kept as bits there."""
    pages = jax.ShapeDtypeStruct((1 << 20,), jnp.bfloat16)
    slots = jax.ShapeDtypeStruct((8,), jnp.int32)

    def write(pages: jax.Array, slots: jax.Array) -> jax.Array:
        return pages.at[slots].set(1)

    memory = jax.jit(write, donate_argnums=0).lower(pages, slots).compile().memory_analysis()
    assert memory.temp_size_in_bytes >= 2 << 20
    kept = jax.jit(lambda pages, slots: pages.at[slots].set(1)).lower(pages, slots).compile().memory_analysis()
    assert kept.alias_size_in_bytes == 0
