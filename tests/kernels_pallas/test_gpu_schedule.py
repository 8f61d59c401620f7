"""The GPU schedule: every visible key of every query is in exactly one item, within the static bounds."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import Geometry
from kernels_pallas.gpu import kernel, make_schedule
from kernels_pallas.gpu.schedule import ROW_ALIGNMENT, launches


@partial(jax.jit, static_argnames="geometry")
def schedule(cu_q_lens, kv_starts, kv_lens, num_seqs, *, geometry):
    return make_schedule(cu_q_lens, kv_starts, kv_lens, num_seqs, geometry=geometry)


def check(geometry, q_lens, kv_starts, kv_lens, junk=0):
    """Numpy's own account of who sees what against the table of items. Rows past the sequences hold `junk`."""
    pad = geometry.num_seqs - len(q_lens)
    cu = np.concatenate([[0], np.cumsum(q_lens), np.full(pad, junk)]).astype(np.int32)
    starts, lens = (np.concatenate([x, np.full(pad, junk)]).astype(np.int32) for x in (kv_starts, kv_lens))
    found = schedule(cu, starts, lens, np.array([len(q_lens)], np.int32), geometry=geometry)
    for launch, items in zip(launches(geometry), found, strict=True):
        items = jax.tree.map(np.asarray, items)
        num_items = int(items.num_items[0])
        assert num_items <= launch.max_items
        table = items.table[:num_items]
        assert (table[:, kernel.FIRST_ROW] % ROW_ALIGNMENT == 0).all()
        assert (table[:, kernel.FIRST_ROW] + launch.blocks.tile_rows <= launch.num_rows).all()
        assert (table[:, kernel.KEY_BEGIN] % geometry.page_size == 0).all()
        assert (table[:, kernel.KEY_BEGIN] < table[:, kernel.KEY_END]).all()
        for i in range(launch.num_tokens):
            token = launch.first_token + i
            seq = int(np.searchsorted(np.cumsum(q_lens), token, side="right"))
            if seq == len(q_lens):
                assert items.num_splits[i] == 0
                continue
            position = kv_lens[seq] - q_lens[seq] + token - cu[seq]
            own = table[items.first_item[i] : items.first_item[i] + items.num_splits[i]]
            assert len(own) <= launch.max_splits
            keys = np.concatenate([np.arange(r[kernel.KEY_BEGIN], r[kernel.KEY_END]) for r in own] or [[]])
            end = min(kv_lens[seq], position + 1) if geometry.causal else kv_lens[seq]
            seen = keys[keys < end]
            np.testing.assert_array_equal(seen, np.arange(kv_starts[seq], max(end, kv_starts[seq])))
            assert keys.size == 0 or keys.max() < kv_lens[seq]
            for row in own:
                assert row[kernel.SEQ] == seq
                at = row[kernel.FIRST_ROW] + items.row[i]
                want = token * geometry.group + np.arange(geometry.group)
                np.testing.assert_array_equal(items.source[at : at + geometry.group], want)
                assert row[kernel.POSITION] + items.row[i] // geometry.group == position


def make_geometry(**kw):
    return Geometry(**{"page_dtype": jnp.bfloat16, "q_dtype": jnp.bfloat16, "head_dim": 128, "page_size": 16, **kw})


def test_one_long_sequence_is_split_over_the_card():
    geometry = make_geometry(
        num_tokens=1, num_seqs=1, pages_per_seq=8192, num_q_heads=32, num_kv_heads=8, num_decode_slots=1
    )
    (launch,) = launches(geometry)
    (items,) = schedule(*(np.array(x, np.int32) for x in ([0, 1], [0], [131072], [1])), geometry=geometry)
    assert int(items.num_items[0]) * 8 >= 132
    lengths = np.asarray(items.table[:, kernel.KEY_END] - items.table[:, kernel.KEY_BEGIN])[: int(items.num_items[0])]
    assert lengths.sum() == 131072 and lengths.max() - lengths.min() <= launch.split_unit


GEOMETRY = {"num_tokens": 160, "num_seqs": 7, "pages_per_seq": 400, "num_q_heads": 14, "num_kv_heads": 2}


@settings(max_examples=20, deadline=None)
@given(st.data(), st.booleans(), st.integers(0, 4), st.integers(-5, 5))
def test_every_key_once(data, causal, num_live, junk):
    slots = 3 if causal else 0
    q_lens = [1] * slots + data.draw(st.lists(st.integers(0, 39), min_size=num_live, max_size=num_live))
    kv_lens = [data.draw(st.integers(n if n > 1 else 0, 6300)) for n in q_lens]
    kv_starts = [16 * data.draw(st.integers(0, n // 16)) for n in kv_lens]
    check(make_geometry(**GEOMETRY, num_decode_slots=slots, causal=causal), q_lens, kv_starts, kv_lens, junk)
