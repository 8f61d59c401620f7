"""The Hopper kernel's numbers in Mosaic GPU's interpreter: pages, rings, barriers, masks, softmax, stores, the merge.

What runs here is the kernel itself but for its matrix products, which are jnp.dot (`kernel._product`), and layouts.
Two blocks of threads are simulated, so that each goes through several items.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.gpu import kernel
from kernels_pallas.gpu.schedule import launches, make_schedule
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


def test_window_of_split_keys_starts_at_the_query():
    case = make_case(
        5,
        q_lens=[1, 20],
        kv_lens=[700, 600],
        num_decode=1,
        page_size=64,
        kv_heads=1,
        group=2,
        head_dim=64,
        first_readable=[256, 128],
        **BF16,
    )
    geometry, window = case.geometry(), 400
    lengths = (case.cu_q_lens, case.kv_starts, case.kv_lens, case.num_seqs)
    schedule = jax.jit(partial(make_schedule, geometry=geometry))(*lengths)
    for launch, items in zip(launches(geometry), schedule, strict=True):
        table = np.asarray(items.table)[: int(items.num_items[0])]
        assert launch.max_splits > 1 and len(table) > 1, "a part's end must not be the query's position"
        first_seen = table[0, kernel.POSITION] - window + 1
        assert first_seen < table[:-1, kernel.KEY_END].max(), "the window must start in a part that is not the last"
    check_attend(case, sliding_window=window)


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
