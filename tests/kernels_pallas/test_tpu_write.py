"""Writing into TPU pages, in the interpreter, against plain indexing: everything else in the pages stays as it was."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import PageLayout
from kernels_pallas.tpu import write, write_kv
from oracles.paged_cases import pack, unpack


@pytest.fixture(autouse=True)
def no_races(capfd):
    pltpu.reset_tpu_interpret_mode_state()
    yield
    pltpu.reset_tpu_interpret_mode_state()
    printed = capfd.readouterr().out
    assert "RACE DETECTED" not in printed, printed[:2000]


def check(slots, *, dtype=jnp.bfloat16, head_dim=128, page_size=32, num_pages=6, kv_heads=2):
    rng = np.random.default_rng(0)
    layout = PageLayout(
        num_pages=num_pages,
        page_size=page_size,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        backend="tpu-interpret",
    )
    shape = (num_pages, kv_heads, page_size, head_dim)
    scale = 30 if jnp.dtype(dtype).itemsize == 1 else 1
    halves = [(scale * rng.normal(size=shape)).astype(np.float32).astype(layout.dtype) for _ in range(2)]
    if dtype != jnp.int8:
        halves[0][1] = halves[1][0] = np.nan  # stays what it is
    slots = np.asarray(slots, np.int32)
    k, v = ((scale * rng.normal(size=(len(slots), kv_heads, head_dim))).astype(np.float32) for _ in range(2))
    got = unpack(
        layout,
        write_kv(
            jnp.asarray(pack(layout, *halves)), jnp.asarray(k), jnp.asarray(v), jnp.asarray(slots), interpret=True
        ),
    )
    live = (slots >= 0) & (slots < num_pages * page_size)
    for half, new, out in zip(halves, (k, v), got, strict=True):
        rounded = np.clip(np.rint(new), -127, 127) if dtype == jnp.int8 else new
        half[slots[live] // page_size, :, slots[live] % page_size] = rounded[live].astype(layout.dtype)
        np.testing.assert_array_equal(out.astype(np.float32), half.astype(np.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.int8, jnp.float8_e4m3fn])
def test_chunks_and_decode_tokens(dtype):
    """A chunk over two pages from the middle of one; single tokens; padding before, between and after."""
    check([999, 5, *range(70, 101), -1, 40, 192], dtype=dtype, kv_heads=1)


@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (256, 16), (128, 128)])
def test_layouts(head_dim, page_size):
    check([3, *range(2 * page_size - 14, 2 * page_size + 5)], head_dim=head_dim, page_size=page_size, num_pages=3)


def test_slots_in_any_order():
    """Neighbours in one group that do not follow each other: the second waits until the first is written."""
    check([7, 6, 40, 5, 41, 4, 100, 3, 42, 101], num_pages=4)


def test_more_runs_than_buffers(monkeypatch):
    monkeypatch.setattr(write, "_AHEAD", 2)
    monkeypatch.setattr(write, "_BUFFERS", 4)
    check([16 * i + i for i in range(11)])


def test_several_chunks_of_tokens(monkeypatch):
    """A run is cut where a chunk of tokens ends, in the middle of a group."""
    monkeypatch.setattr(write, "_CHUNK_TOKENS", 64)
    check([*range(10, 84)], page_size=64, num_pages=2, kv_heads=1)


def test_nothing_to_write():
    check([10_000, -1])


def test_too_many_tokens_for_the_scalar_memory():
    pages = jnp.zeros(
        PageLayout(num_pages=1, page_size=16, num_kv_heads=1, head_dim=64, dtype=jnp.bfloat16, backend="tpu").shape
    )
    k = jnp.zeros((40_000, 1, 64))
    with pytest.raises(ValueError, match=r"the runs of 40000 tokens need \d+ bytes of SMEM, more than the 524288"):
        write_kv(pages, k, k, jnp.zeros(40_000, jnp.int32), interpret=True)
