"""The CPU's attention kernel beyond what all backends are asked: any shape, processors without its instructions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels_pallas import Geometry, paged_attention
from kernels_pallas.cpu import call
from kernels_pallas.cpu.attention import check, make_schedule, schedule
from oracles.paged_cases import check_attend, check_paged_attention, make_case

ON_CPU = {"backend": "cpu", "q_dtype": jnp.bfloat16}
SHAPES = [(1, 1, 16, 1), (8, 2, 80, 7), (16, 3, 64, 3), (24, 1, 32, 16), (64, 1, 256, 2)]


@pytest.mark.parametrize(("page_size", "kv_heads", "head_dim", "group"), SHAPES)
@settings(max_examples=4, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_any_ragged_batch(page_size, kv_heads, head_dim, group, data, seed):
    """Fixed sizes, so that one kernel and one program serve all examples; two tiles' tokens and two blocks' keys."""
    q_lens = [1, 1, *data.draw(st.tuples(st.integers(1, 110), st.integers(1, 70)))]
    kv_lens = [data.draw(st.integers(0 if s < 2 else n, n + 330)) for s, n in enumerate(q_lens)]
    sizes = {"page_size": page_size, "kv_heads": kv_heads, "head_dim": head_dim, "group": group}
    layout = {"num_decode": 2, "pages_per_seq": -(-440 // page_size), "token_padding": 190 - sum(q_lens)}
    check_paged_attention(make_case(seed, q_lens=q_lens, kv_lens=kv_lens, **layout, **sizes, **ON_CPU))


def test_without_the_processors_instructions(monkeypatch):
    """The scale is of this test alone: kernels are kept by what they are, wherever they were compiled."""
    monkeypatch.setattr(call, "host_features", lambda: frozenset())
    sizes = {"num_decode": 2, "page_size": 16, "kv_heads": 2, "group": 3, "head_dim": 48}
    case = make_case(3, q_lens=[1, 1, 40], kv_lens=[33, 0, 300], **sizes, **ON_CPU)
    check_paged_attention(case, scale=0.1234, soft_cap=3.0, sliding_window=100)


@pytest.mark.parametrize(("head_dim", "soft_cap"), [(32, None), (64, None), (32, 5.0)])
def test_more_queries_than_keys(head_dim, soft_cap):
    """The first of them stand before the sequence's first key: scores of none, at scales that round up and down."""
    sizes = {"num_decode": 0, "page_size": 16, "kv_heads": 1, "group": 2, "head_dim": head_dim}
    check_attend(make_case(3, q_lens=[17], kv_lens=[9], **sizes, **ON_CPU), soft_cap=soft_cap)


def test_a_maximum_that_stays_keeps_what_was_summed():
    """The first of 30,000 keys has the highest score; 470 blocks follow."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 1, 16)).astype(jnp.bfloat16)
    pages = rng.standard_normal((1875, 1, 2, 16, 16)).astype(jnp.bfloat16)
    pages[0, 0, 0, 0] = 5 * q[0, 0].astype(np.float32)
    scores = pages[:, 0, 0].reshape(-1, 16).astype(np.float64) @ q[0, 0].astype(np.float64) / 4
    table, lengths = np.arange(1875, dtype=np.int32)[None], np.array([30_000], np.int32)
    args = (q, pages.view(np.uint16), table, np.array([0, 1], np.int32), lengths, np.array([1], np.int32))
    _, lse = paged_attention(*map(jnp.asarray, args), num_decode_slots=1, return_lse=True, backend="cpu")
    assert abs(lse[0, 0] - np.logaddexp.reduce(scores)) < 2e-4


def geometry(**change) -> Geometry:
    sizes = {
        "num_tokens": 300,
        "num_seqs": 9,
        "pages_per_seq": 40,
        "num_q_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 64,
        "page_size": 16,
        "num_decode_slots": 4,
        "page_dtype": jnp.bfloat16,
        "q_dtype": jnp.bfloat16,
    }
    return Geometry(**sizes | change)


def tiles_of(chunks: list[int], kv_lens: list[int], threads: int, monkeypatch) -> tuple[np.ndarray, np.ndarray]:
    """Of four decode slots and these chunks: rows of the table, and where each sequence's tokens begin."""
    q_lens = [1] * 4 + chunks
    cu_q_lens = np.full(10, sum(q_lens), np.int32)
    cu_q_lens[: len(q_lens) + 1] = np.cumsum([0, *q_lens])
    lens = np.array(kv_lens + [77] * (9 - len(q_lens)), np.int32)
    monkeypatch.setattr(schedule.os, "cpu_count", lambda: threads)
    if threads not in _schedules:
        _schedules[threads] = jax.jit(lambda *lengths: make_schedule(*lengths, geometry=geometry()))
    tiles = _schedules[threads](cu_q_lens, np.zeros(9, np.int32), lens, np.array([len(q_lens)], np.int32))
    table, num_tiles = np.asarray(tiles.table), int(tiles.sizes[0])
    assert not table[num_tiles:, 2].any()
    return table[:num_tiles], cu_q_lens


_schedules = {}
CHUNKS = st.lists(st.integers(1, 290), max_size=3).filter(lambda chunks: sum(chunks) <= 296)


@pytest.mark.parametrize("threads", [1, 4, 64])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunks=CHUNKS, empty_slots=st.integers(0, 2), seed=st.integers(0, 2**31))
def test_every_token_is_in_one_tile_and_the_most_work_comes_first(threads, monkeypatch, chunks, empty_slots, seed):
    rng = np.random.default_rng(seed)
    q_lens = [1] * 4 + chunks
    kv_lens = [int(rng.integers(n, 600)) for n in q_lens]
    for slot in range(empty_slots):
        kv_lens[slot] = 0
    table, cu_q_lens = tiles_of(chunks, kv_lens, threads, monkeypatch)
    owners = np.full(300, -1)
    for seq, token, size, position, begin, end in table.tolist():
        assert 1 <= size <= 96 and (owners[token : token + size] == -1).all()
        owners[token : token + size] = seq if end > begin else 100
        if end > begin:
            assert begin == 0 and end == position + size
            assert position == kv_lens[seq] - q_lens[seq] + token - cu_q_lens[seq]
    want = np.full(300, 100)
    want[: sum(q_lens)] = np.repeat([s if n else 100 for s, n in enumerate(kv_lens)], q_lens)
    np.testing.assert_array_equal(owners, want)
    work = np.maximum(table[:, 5] - table[:, 4], 0) * table[:, 2]
    assert (np.diff(work) <= 0).all()


@pytest.mark.parametrize(
    ("threads", "chunks", "want"),
    [
        (1, [184, 60], [[92, 92], [60]]),  # as equal as they can be
        (2, [184, 60], [[92, 92], [60]]),  # two key heads: an item for each thread anyway
        (4, [184, 60], [[92, 92], [30, 30]]),  # few tiles: one that is all of its chunk is cut, too
        (4, [150, 60, 80], [[74, 76], [60], [80]]),  # many: it stays whole
        (4, [200], [[50, 50, 50, 50]]),  # three tiles would leave a thread without its second item
        (4, [60], [[30, 30]]),  # alone, it is cut
        (4, [30], [[30]]),  # unless it is small
    ],
)
def test_tiles_of_a_chunk_go_evenly_on_all_threads(threads, chunks, want, monkeypatch):
    """Tiles of up to 96 tokens, two key heads."""
    table, _ = tiles_of(chunks, [1] * 4 + [500] * len(chunks), threads, monkeypatch)
    sizes = [sorted(table[table[:, 0] == 4 + i, 2].tolist()) for i in range(len(chunks))]
    assert sizes == want


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 24}, "head_dim on cpu: expected a multiple of 16 up to 256, got 24"),
        ({"head_dim": 272}, "head_dim on cpu: .* got 272"),
        ({"page_dtype": jnp.float32}, "pages on cpu: expected bfloat16, got float32"),
        ({"q_dtype": jnp.float32}, "queries on cpu: expected bfloat16, got float32"),
        ({"num_q_heads": 1024}, "query heads a key head on cpu: expected at most 288, got 512"),
    ],
)
def test_what_cannot_be_served_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        check(geometry(**change), sliding_window=None, soft_cap=None)
    check(geometry(), sliding_window=3, soft_cap=2.0)
    with pytest.raises(ValueError, match="sliding_window: expected causal"):
        check(geometry(causal=False), sliding_window=3, soft_cap=None)
