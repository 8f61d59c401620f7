"""The public attention call against the oracle: ragged batches, shuffled pages, NaN wherever nothing may be read."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import PageLayout, paged_attention, resolve_backend, write_kv
from oracles.attention import attend

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}


def run_case(
    seed, dtype, q_lens, kv_lens, *, num_decode, page_size, kv_heads, group, head_dim, token_padding=0, seq_padding=0
):
    """Writes keys with `write_kv`, attends, and compares with the oracle. Pages and table padding hold NaN."""
    rng = np.random.default_rng(seed)
    pages_per_seq = max(1, max(-(-n // page_size) for n in kv_lens)) + 1
    num_pages = len(kv_lens) * pages_per_seq + 2
    layout = PageLayout(num_pages=num_pages, page_size=page_size, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    order = rng.permutation(num_pages - 1) + 1  # page 0 stays poisoned and fills the table's unused entries
    table = np.zeros((len(kv_lens) + seq_padding, pages_per_seq), np.int32)
    keys, values, slots = [], [], []
    for s, kv_len in enumerate(kv_lens):
        used = -(-kv_len // page_size)
        table[s, :used] = order[s * pages_per_seq : s * pages_per_seq + used]
        keys.append(np.asarray(jnp.asarray(rng.normal(size=(kv_len, kv_heads, head_dim)), dtype)))
        values.append(np.asarray(jnp.asarray(rng.normal(size=(kv_len, kv_heads, head_dim)), dtype)))
        position = np.arange(kv_len)
        slots.append(table[s, position // page_size] * page_size + position % page_size)
    pages = jnp.full(layout.shape, jnp.nan, dtype)
    if layout.storage_dtype == jnp.uint16:
        pages = jax.lax.bitcast_convert_type(pages, jnp.uint16)
    padding = np.full(3, num_pages * page_size)  # slots past the end must be dropped
    nothing = np.zeros((3, kv_heads, head_dim), np.float32)
    pages = write_kv(
        pages,
        jnp.asarray(np.concatenate([*keys, nothing]), dtype),
        jnp.asarray(np.concatenate([*values, nothing]), dtype),
        jnp.asarray(np.concatenate([*slots, padding]), jnp.int32),
    )
    num_tokens = sum(q_lens)
    q = np.asarray(jnp.asarray(rng.normal(size=(num_tokens + token_padding, kv_heads * group, head_dim)), dtype))
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens), np.full(seq_padding, num_tokens)]).astype(np.int32)
    out, lse = paged_attention(
        jnp.asarray(q),
        pages,
        jnp.asarray(table),
        jnp.asarray(cu_q_lens),
        jnp.asarray(list(kv_lens) + [0] * seq_padding, jnp.int32),
        jnp.asarray([len(kv_lens)], jnp.int32),
        num_decode_slots=num_decode,
        return_lse=True,
    )
    assert out.dtype == dtype and lse.dtype == jnp.float32
    assert np.isfinite(np.asarray(out, np.float64)).all(), "a masked or unwritten slot was read"
    want, want_lse = attend(q[:num_tokens], keys, values, q_lens, kv_lens, 1 / math.sqrt(head_dim))
    got = np.asarray(out, np.float64)[:num_tokens]
    assert np.linalg.norm(got - want) <= TOLERANCE[dtype] * np.linalg.norm(want)
    finite = np.isfinite(want_lse)
    got_lse = np.asarray(lse, np.float64)[:num_tokens]
    assert (np.isfinite(got_lse) == finite).all()
    assert np.linalg.norm(got_lse[finite] - want_lse[finite]) <= TOLERANCE[dtype] * np.linalg.norm(want_lse[finite])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("page_size", [16, 128])
def test_prompt_chunks(dtype, page_size):
    q_lens = [1, page_size - 1, page_size, page_size + 1, 200]
    kv_lens = [1, page_size - 1, 2 * page_size, page_size + 1, 531]
    run_case(
        0, dtype, q_lens, kv_lens, num_decode=0, page_size=page_size, kv_heads=2, group=3, head_dim=64, seq_padding=2
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_decode_slots_with_empty_ones(dtype):
    kv_lens = [1, 15, 0, 16, 17, 300, 0]
    run_case(1, dtype, [1] * 7, kv_lens, num_decode=7, page_size=16, kv_heads=3, group=3, head_dim=64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_decode_and_prompt_chunks_in_one_step(dtype):
    q_lens, kv_lens = [1, 1, 1, 40, 130], [33, 0, 90, 40, 400]
    run_case(
        2,
        dtype,
        q_lens,
        kv_lens,
        num_decode=3,
        page_size=16,
        kv_heads=1,
        group=8,
        head_dim=128,
        token_padding=9,
        seq_padding=3,
    )


shapes = st.fixed_dictionaries(
    {
        "page_size": st.sampled_from([1, 8, 16, 64]),
        "kv_heads": st.sampled_from([1, 2, 3]),
        "group": st.sampled_from([1, 3, 4]),
        "head_dim": st.sampled_from([8, 64]),
        "token_padding": st.integers(0, 5),
        "seq_padding": st.integers(0, 2),
    }
)


@settings(max_examples=12, deadline=None)
@given(st.data(), shapes, st.integers(0, 2**31))
def test_any_ragged_batch(data, shape, seed):
    num_decode = data.draw(st.integers(0, 3))
    chunks = data.draw(st.lists(st.integers(1, 150), min_size=0 if num_decode else 1, max_size=3))
    q_lens = [1] * num_decode + chunks
    kv_lens = data.draw(st.tuples(*[st.integers(0, 150)] * num_decode, *[st.integers(n, n + 150) for n in chunks]))
    run_case(seed, jnp.float32, q_lens, list(kv_lens), num_decode=num_decode, **shape)


def test_an_unknown_backend_is_refused():
    assert resolve_backend("auto", "cpu") == "jnp"
    with pytest.raises(ValueError, match="expected auto or one of jnp, got 'cuda'"):
        resolve_backend("cuda", "cpu")
