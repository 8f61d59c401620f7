"""The public calls against the oracle: ragged batches, shuffled pages, poison wherever nothing may be read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import Geometry, PageLayout, make_schedule, paged_attention, write_kv
from oracles.paged_cases import check_attend, check_paged_attention, make_case, unpack

HEADS = {"kv_heads": 2, "group": 3, "head_dim": 64}
QUANTISED = (jnp.int8, jnp.float8_e4m3fn)
SERVED = [("jnp", jnp.float32), ("jnp", jnp.bfloat16), ("cpu", jnp.bfloat16)]


def edges(page_size: int) -> tuple[list[int], list[int]]:
    """q_lens and kv_lens around a page's size."""
    q_lens = [1, page_size - 1, page_size, page_size + 1, 100]
    return q_lens, [1, page_size - 1, 2 * page_size, page_size + 1, 331]


@pytest.mark.parametrize(("backend", "dtype"), SERVED)
@pytest.mark.parametrize("page_size", [16, 128])
def test_prompt_chunks(backend, dtype, page_size):
    q_lens, kv_lens = edges(page_size)
    sizes = {"num_decode": 0, "page_size": page_size, "seq_padding": 2, **HEADS}
    check_paged_attention(make_case(0, backend=backend, q_dtype=dtype, q_lens=q_lens, kv_lens=kv_lens, **sizes))


@pytest.mark.parametrize(("backend", "dtype"), SERVED)
def test_decode_slots_with_empty_ones(backend, dtype):
    kv_lens = [1, 15, 0, 16, 17, 300, 0]
    sizes = {"num_decode": 7, "page_size": 16, **HEADS}
    check_paged_attention(make_case(1, backend=backend, q_dtype=dtype, q_lens=[1] * 7, kv_lens=kv_lens, **sizes))


@pytest.mark.parametrize(
    ("backend", "q_dtype", "page_dtype"),
    [
        ("jnp", jnp.float32, jnp.float32),
        ("jnp", jnp.float32, jnp.bfloat16),
        ("jnp", jnp.bfloat16, jnp.bfloat16),
        ("jnp", jnp.float32, jnp.int8),
        ("jnp", jnp.bfloat16, jnp.float8_e4m3fn),
        ("cpu", jnp.bfloat16, jnp.bfloat16),
    ],
)
@pytest.mark.parametrize("how", [{}, {"sliding_window": 21, "soft_cap": 1.5}], ids=["plain", "window-cap"])
def test_decode_and_prompt_chunks_in_one_step(backend, q_dtype, page_dtype, how):
    """Pages wholly before a sequence's lowest window are poisoned too, as if they had been given away."""
    q_lens, kv_lens = [1, 1, 1, 40, 70], [33, 0, 90, 40, 200]
    readable = None
    if "sliding_window" in how:
        window = how["sliding_window"]
        readable = [max(0, n - q - window + 1) // 16 * 16 for q, n in zip(q_lens, kv_lens, strict=True)]
    case = make_case(
        2,
        backend=backend,
        q_dtype=q_dtype,
        page_dtype=page_dtype,
        q_lens=q_lens,
        kv_lens=kv_lens,
        num_decode=3,
        page_size=16,
        token_padding=9,
        seq_padding=3,
        first_readable=readable,
        **HEADS,
    )
    check_paged_attention(case, **how)


@pytest.mark.parametrize(("backend", "dtype"), SERVED)
def test_keys_from_a_start_and_without_causality(backend, dtype):
    """A backend's own `attend`: what the suffix pass and the family pass ask of it."""
    common = {"backend": backend, "q_dtype": dtype, "page_size": 16, "seq_padding": 2, "token_padding": 3, **HEADS}
    starts, kv_lens = [16, 0, 64, 32, 16], [33, 0, 90, 90, 16]
    check_attend(make_case(3, q_lens=[1, 1, 1, 40, 17], kv_lens=kv_lens, kv_starts=starts, num_decode=3, **common))
    family = make_case(
        4, q_lens=[1, 33, 16, 17], kv_lens=[32, 0, 288, 400], kv_starts=[16, 0, 0, 96], num_decode=0, **common
    )
    check_attend(family, causal=False, soft_cap=2.0)


shapes = st.fixed_dictionaries(
    {
        "page_size": st.sampled_from([1, 8, 16, 64]),
        "kv_heads": st.sampled_from([1, 2, 3]),
        "group": st.sampled_from([1, 3, 4]),
        "head_dim": st.sampled_from([8, 64]),
        "token_padding": st.integers(0, 5),
        "seq_padding": st.integers(0, 2),
        "page_dtype": st.sampled_from([jnp.float32, *QUANTISED]),
    }
)


@settings(max_examples=8, deadline=None)
@given(st.data(), shapes, st.none() | st.integers(1, 200), st.none() | st.floats(0.5, 30), st.integers(0, 2**31))
def test_any_ragged_batch(data, shape, window, cap, seed):
    num_decode = data.draw(st.integers(0, 3))
    chunks = data.draw(st.lists(st.integers(1, 100), min_size=0 if num_decode else 1, max_size=3))
    q_lens = [1] * num_decode + chunks
    kv_lens = data.draw(st.tuples(*[st.integers(0, 150)] * num_decode, *[st.integers(n, n + 150) for n in chunks]))
    case = make_case(seed, q_lens=q_lens, kv_lens=list(kv_lens), num_decode=num_decode, **shape)
    check_paged_attention(case, sliding_window=window, soft_cap=cap)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, *QUANTISED])
def test_write_puts_a_steps_keys_into_their_slots(dtype):
    """Rounded to the page dtype, divided by the scales, clipped at its limits; slots past the end are dropped."""
    layout = PageLayout(num_pages=5, page_size=16, num_kv_heads=2, head_dim=64, dtype=dtype)
    rng = np.random.default_rng(5)
    k, v = rng.normal(size=(2, 20, 2, 64)).astype(np.float32)
    k[0, 0, :2] = 1e4, -1e4
    slots = rng.permutation(5 * 16)[:20].astype(np.int32)
    slots[7:9] = 5 * 16
    scales = np.array([[0.02, 0.03], [0.01, 0.04]], np.float32) if layout.dtype.itemsize == 1 else None
    written = jax.jit(write_kv)(layout.zeros(), k, v, slots, kv_scales=scales)
    for half, values, scale in zip(
        unpack(layout, written), (k, v), [None] * 2 if scales is None else scales, strict=True
    ):
        got = half.astype(np.float32).transpose(0, 2, 1, 3).reshape(5 * 16, 2, 64)
        want = np.zeros_like(got)
        numbers = values if scale is None else values / scale[None, :, None]
        if dtype == jnp.int8:
            numbers = np.clip(np.rint(numbers), -127, 127)
        elif dtype == jnp.float8_e4m3fn:
            numbers = np.clip(numbers, -448, 448)
        kept = slots < 5 * 16
        want[slots[kept]] = numbers[kept].astype(layout.dtype).astype(np.float32)
        np.testing.assert_array_equal(got, want)


def test_a_schedule_serves_every_layer():
    case = make_case(6, q_lens=[1, 1, 30], kv_lens=[40, 0, 64], num_decode=2, page_size=16, **HEADS)
    args = [jnp.asarray(x) for x in (case.page_table, case.cu_q_lens, case.kv_lens, case.num_seqs)]
    schedule = make_schedule(*args[1:], geometry=case.geometry())
    with_it = paged_attention(jnp.asarray(case.q), case.kv_pages, *args, num_decode_slots=2, schedule=schedule)
    without = paged_attention(jnp.asarray(case.q), case.kv_pages, *args, num_decode_slots=2)
    np.testing.assert_array_equal(with_it, without)


def arguments(dtype=jnp.bfloat16):
    """A valid call of 6 tokens and 2 sequences; a test breaks one thing."""
    layout = PageLayout(num_pages=4, page_size=16, num_kv_heads=2, head_dim=64, dtype=dtype)
    return {
        "q": jnp.zeros((6, 4, 64), jnp.bfloat16),
        "kv_pages": layout.zeros(),
        "page_table": jnp.zeros((2, 3), jnp.int32),
        "cu_q_lens": jnp.array([0, 1, 6], jnp.int32),
        "kv_lens": jnp.array([1, 5], jnp.int32),
        "num_seqs": jnp.array([2], jnp.int32),
        "num_decode_slots": 1,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((6, 4, 128), jnp.bfloat16)}, "head_dim 128 does not fit pages"),
        ({"q": jnp.zeros((6, 3, 64), jnp.bfloat16)}, "3 query heads and 2 key heads"),
        ({"q": jnp.zeros((6, 4, 64), jnp.float16)}, "q dtype: expected bfloat16 or float32, got float16"),
        ({"q": jnp.zeros((6, 64), jnp.bfloat16)}, "q: expected 3 axes"),
        ({"kv_pages": jnp.zeros((4, 2, 2, 16, 64), jnp.int32)}, "made by a PageLayout"),
        ({"cu_q_lens": jnp.zeros(2, jnp.int32)}, r"cu_q_lens: expected int32 \(3,\)"),
        ({"kv_lens": jnp.zeros(2, jnp.float32)}, r"kv_lens: expected int32 \(2,\), got float32"),
        ({"num_seqs": jnp.array(2, jnp.int32)}, r"num_seqs: expected int32 \(1,\)"),
        ({"num_decode_slots": 3}, "num_decode_slots: expected 0 to the number of sequences"),
        ({"sliding_window": 0}, "sliding_window: expected at least 1 key"),
        ({"soft_cap": 0.0}, "soft_cap: expected a positive number"),
        ({"sm_scale": -1.0}, "sm_scale: expected a positive number"),
        ({"kv_scales": jnp.ones((2, 2), jnp.float32)}, "kv_scales: expected none with bfloat16 pages"),
        ({"backend": "triton"}, "expected one of jnp, cpu, tpu, gpu"),
    ],
)
def test_bad_arguments_are_refused_when_traced(change, message):
    with pytest.raises(ValueError, match=message):
        paged_attention(**arguments() | change)


def test_bad_scales_and_writes_are_refused():
    call = arguments(jnp.int8)
    with pytest.raises(ValueError, match="kv_scales: expected scales with int8 pages"):
        paged_attention(**call)
    with pytest.raises(ValueError, match=r"kv_scales: expected float32 \(2, 2\)"):
        paged_attention(**call, kv_scales=jnp.ones((2, 4), jnp.float32))
    scales, slots = jnp.ones((2, 2), jnp.float32), jnp.zeros(6, jnp.int32)
    pages, new = call["kv_pages"], jnp.zeros((6, 2, 64))
    for dtype in QUANTISED:
        with pytest.raises(ValueError, match=f"kv_scales: expected scales with {jnp.dtype(dtype)} pages, got none"):
            write_kv(arguments(dtype)["kv_pages"], new, new, slots)
    with pytest.raises(ValueError, match=r"kv_scales: expected float32 \(2, 2\)"):
        write_kv(pages, new, new, slots, kv_scales=scales[:, :1])
    with pytest.raises(ValueError, match="kv_scales: expected none with bfloat16 pages, got scales"):
        write_kv(arguments()["kv_pages"], new, new, slots, kv_scales=scales)
    with pytest.raises(ValueError, match=r"expected k and v of shape \[T, 2, 64\]"):
        write_kv(pages, new, new[:, :1], jnp.zeros(6, jnp.int32))
    with pytest.raises(ValueError, match=r"slots: expected int32 \(6,\)"):
        write_kv(pages, new, new, jnp.zeros(5, jnp.int32))


@pytest.mark.parametrize(("backend", "dtype"), [*[("gpu-interpret", dtype) for dtype in QUANTISED], ("cpu", jnp.int8)])
def test_quantised_pages_are_left_to_jnp(backend, dtype):
    """Written and read: the backends lay pages out alike."""
    sizes = {
        "page_size": 16,
        "kv_heads": 2,
        "group": 2,
        "head_dim": 64,
        "page_dtype": dtype,
        "backend": backend,
    }
    check_paged_attention(make_case(5, q_lens=[1, 1, 20], kv_lens=[33, 16, 40], num_decode=2, **sizes))
    pages = PageLayout(
        num_pages=3, page_size=16, num_kv_heads=2, head_dim=64, dtype=jnp.dtype(dtype), backend=backend
    ).zeros()
    new = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2, 64)), jnp.float32)
    scales = jnp.full((2, 2), 0.05, jnp.float32)
    written = write_kv(pages, new, new, jnp.arange(16, 20, dtype=jnp.int32), kv_scales=scales, backend=backend)
    stored = np.asarray(written[1, :, 0, :4].astype(jnp.float32)).transpose(1, 0, 2) * 0.05
    np.testing.assert_allclose(stored, new, rtol=0.07, atol=0.03)


def test_a_geometry_is_a_static_argument():
    call = arguments()
    one, same = (
        Geometry.from_arrays(call["q"], call["kv_pages"], call["page_table"], num_decode_slots=1) for _ in range(2)
    )
    assert hash(one) == hash(same) and one == same
    assert (one.group, one.page_dtype, one.num_tokens, one.pages_per_seq) == (2, jnp.bfloat16, 6, 3)
