"""The Hopper kernel's numbers in Mosaic GPU's interpreter: pages, rings, barriers, masks, softmax, stores, the merge.

What runs here is the kernel itself but for its matrix products, which are jnp.dot (`kernel._product`), and layouts.
Two blocks of threads are simulated, so that each goes through several items.
"""

from __future__ import annotations

import jax.numpy as jnp

from kernels_pallas.gpu.schedule import launches
from oracles.paged_cases import check_attend, make_case

BF16 = {"backend": "gpu-interpret", "q_dtype": jnp.bfloat16, "page_dtype": jnp.bfloat16}


def test_decode_with_empty_slots_and_split_keys():
    case = make_case(
        0,
        q_lens=[1] * 5,
        kv_lens=[33, 0, 1, 600, 16],
        num_decode=5,
        page_size=16,
        kv_heads=1,
        group=5,
        head_dim=64,
        **BF16,
    )
    (launch,) = launches(case.geometry())
    assert launch.max_splits > 1, "a case that splits nothing does not test the merge"
    check_attend(case)


def test_decode_and_chunks_at_odd_places():
    case = make_case(
        1,
        q_lens=[1, 45, 1, 20],
        kv_lens=[40, 45, 65, 150],
        num_decode=1,
        page_size=32,
        kv_heads=1,
        group=3,
        head_dim=64,
        token_padding=5,
        seq_padding=2,
        **BF16,
    )
    check_attend(case)


def test_window_and_soft_cap_skip_pages():
    case = make_case(
        2,
        q_lens=[1, 9],
        kv_lens=[300, 150],
        num_decode=1,
        page_size=16,
        kv_heads=1,
        group=2,
        head_dim=128,
        first_readable=[256, 96],
        **BF16,
    )
    check_attend(case, sliding_window=40, soft_cap=20.0)


def test_families_see_every_key_of_a_range():
    case = make_case(
        3,
        q_lens=[7, 3],
        kv_lens=[160, 96],
        kv_starts=[0, 64],
        num_decode=0,
        page_size=32,
        kv_heads=1,
        group=4,
        head_dim=64,
        **BF16,
    )
    check_attend(case, causal=False)


def test_float32_queries_and_wide_heads():
    case = make_case(
        4,
        q_lens=[6],
        kv_lens=[90],
        num_decode=0,
        page_size=64,
        kv_heads=1,
        group=1,
        head_dim=256,
        **{**BF16, "q_dtype": jnp.float32},
    )
    check_attend(case)
