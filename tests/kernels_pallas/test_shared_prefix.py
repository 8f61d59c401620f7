"""Shared prefixes read once a family: the oracle's numbers, whatever the families."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import SharedPrefixes, make_schedule, paged_attention
from kernels_pallas.families import FamilyPlanner
from kernels_pallas.family_costs import FamilyCosts
from oracles.paged_cases import check_paged_attention, make_case

HEADS = {"page_size": 16, "kv_heads": 2, "group": 3, "head_dim": 64}
ALWAYS = FamilyCosts(prompt_tile=1, prompt_pass=1.0, family_tile=1, family_pass=0.01, row=0, family=0, step=0)
# Two tool lists below one system prompt of 2 pages, and a sequence that shares nothing; decode slots, one empty, and
# prompt chunks.
NESTED = {
    "q_lens": [1] * 7 + [9, 20],
    "kv_lens": [97, 98, 113, 83, 35, 0, 50, 130, 101],
    "num_decode": 7,
    "parents": [None, (0, 6), (0, 6), (0, 2), (0, 2), None, None, (3, 5), (7, 5)],
}


def families_of(case, *, levels=2):
    planner = FamilyPlanner(page_size=16, levels=levels, costs=ALWAYS)
    return planner.plan(
        case.page_table, case.cu_q_lens, case.kv_lens, num_decode_slots=case.num_decode, num_tokens=len(case.q)
    )


@pytest.mark.parametrize(
    ("backend", "q_dtype", "page_dtype", "levels"),
    [
        ("jnp", jnp.float32, None, 1),
        ("jnp", jnp.float32, None, 2),
        ("jnp", jnp.bfloat16, None, 2),
        ("jnp", jnp.float32, jnp.int8, 2),
        ("jnp", jnp.bfloat16, jnp.float8_e4m3fn, 2),
        ("cpu", jnp.bfloat16, None, 1),
        ("cpu", jnp.bfloat16, None, 2),
    ],
)
def test_nested_families(backend, q_dtype, page_dtype, levels):
    padding = {"token_padding": 3, "seq_padding": 2}
    case = make_case(0, backend=backend, q_dtype=q_dtype, page_dtype=page_dtype, **padding, **NESTED, **HEADS)
    shared = families_of(case, levels=levels)
    assert shared.num_families[0] >= 2 and shared.own_starts.max() == 96
    check_paged_attention(case, shared=shared, soft_cap=3.0)


@pytest.mark.parametrize("backend", ["tpu-interpret", "gpu-interpret"])
def test_nested_families_on_the_kernels(backend):
    """Two families below a third, decode slots and a prompt chunk; the kernels' own calls, gathered and merged."""
    if backend == "gpu-interpret":
        pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    case = make_case(
        2,
        backend=backend,
        q_dtype=jnp.bfloat16,
        q_lens=[1, 1, 1, 1, 3],
        kv_lens=[50, 38, 35, 20, 36],
        num_decode=4,
        parents=[None, (0, 2), (0, 1), (0, 1), (2, 2)],
        page_size=16,
        kv_heads=1,
        group=1,
        head_dim=64,
    )
    shared = families_of(case)
    assert shared.num_families[0] == 3
    assert shared.own_starts.tolist() == [32, 32, 32, 16, 32] and shared.kv_starts[:3].tolist().count(16) == 2
    check_paged_attention(case, shared=shared)


def test_a_family_larger_than_a_tile():
    num = 19
    case = make_case(
        1,
        q_lens=[1] * num,
        kv_lens=[33 + s for s in range(num)],
        num_decode=num,
        parents=[None, *[(0, 2)] * (num - 1)],
        **HEADS,
    )
    shared = families_of(case)
    assert shared.num_families[0] == 1 and shared.cu_q_lens[1] == num
    check_paged_attention(case, shared=shared)


def test_without_families_nothing_changes():
    case = make_case(0, token_padding=3, seq_padding=2, **NESTED, **HEADS)
    plain = check_paged_attention(case)
    nothing = SharedPrefixes.empty(num_tokens=len(case.q), num_seqs=len(case.kv_lens))
    for got, want in zip(check_paged_attention(case, shared=nothing), plain, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_sliding_window_reads_without_families():
    case = make_case(0, **NESTED, **HEADS)
    shared = families_of(case)
    check_paged_attention(case, shared=shared, sliding_window=20)
    args = [jnp.asarray(x) for x in (case.page_table, case.cu_q_lens, case.kv_lens, case.num_seqs)]
    schedule = make_schedule(*args[1:], geometry=case.geometry(), shared=shared)
    call = {"num_decode_slots": case.num_decode, "shared": shared, "schedule": schedule}
    paged_attention(jnp.asarray(case.q), case.kv_pages, *args, **call)
    with pytest.raises(ValueError, match="without it where a window is set"):
        paged_attention(jnp.asarray(case.q), case.kv_pages, *args, **call, sliding_window=20)


@pytest.mark.parametrize(("backend", "dtype"), [("jnp", jnp.float32), ("cpu", jnp.bfloat16)])
@settings(max_examples=8, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_any_tree(backend, dtype, data, seed):
    """Fixed sizes, so that one program serves all examples; what is shared, and how long all are, is drawn."""
    kv_lens, parents, q_lens = [], [], [1] * 5 + [12]
    for s, q_len in enumerate(q_lens):
        parent = data.draw(st.integers(0, s - 1)) if s and data.draw(st.booleans()) else None
        pages = data.draw(st.integers(1, 4)) if parent is not None else 0
        if parent is not None:
            pages = min(pages, max(kv_lens[parent] - q_lens[parent], 0) // 16)
        kv_lens.append(data.draw(st.integers(pages * 16 + q_len, 90)))
        parents.append((parent, pages) if pages else None)
    drawn = {"q_lens": q_lens, "kv_lens": kv_lens, "parents": parents}
    case = make_case(seed, backend=backend, q_dtype=dtype, num_decode=5, pages_per_seq=7, **drawn, **HEADS)
    check_paged_attention(case, shared=families_of(case))
