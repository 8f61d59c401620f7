"""Rotation and the pages' writing, against complex numbers in float64 and a loop over tokens."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.cpu import call
from kernels_pallas.cpu.rotate import rotate_and_write

PAGE_SIZE, NUM_PAGES, HEADS = 4, 40, 2
UNTOUCHED = 7


def written(value: np.ndarray) -> np.ndarray:
    """float64 -> what a page holds of it, as a number."""
    return value.astype(np.float32).astype(jnp.bfloat16).astype(np.float64)


@pytest.mark.parametrize(
    ("group", "head_dim", "num_rows", "live", "num_layers", "features"),
    [(3, 64, 80, [0, 9, 16, 77], 2, "host"), (1, 32, 5, [0, 5, 5, 5], 1, "host"), (2, 96, 9, [0, 3, 4, 9], 1, "none")],
)
def test_queries_and_pages(
    group: int,
    head_dim: int,
    num_rows: int,
    live: list[int],
    num_layers: int,
    features: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The layer's pages are the last in the array."""
    if features == "none":
        monkeypatch.setattr(call, "host_features", frozenset)
    random, half = np.random.default_rng(head_dim), head_dim // 2
    rows = np.r_[live[0] : live[1], live[2] : live[3]]
    angles = random.uniform(0, 7, (num_rows, half))
    cos_sin = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    x = np.full((num_rows, HEADS, (group + 2) * head_dim), np.nan, np.float32)
    x[rows] = random.standard_normal((len(rows), *x.shape[1:]))
    slots = np.full(num_rows, NUM_PAGES * PAGE_SIZE, np.int32)
    slots[rows] = random.permutation(NUM_PAGES * PAGE_SIZE)[: len(rows)]
    slots[rows[1]] = NUM_PAGES * PAGE_SIZE  # alive and nowhere
    pages = np.full((num_layers * NUM_PAGES, HEADS, 2, PAGE_SIZE, head_dim), UNTOUCHED, np.uint16)
    here = slice((num_layers - 1) * NUM_PAGES, num_layers * NUM_PAGES)
    place = {} if num_layers == 1 else {"first_page": np.int32(here.start), "num_pages": NUM_PAGES}

    q, got_pages = jax.jit(partial(rotate_and_write, **place))(x, cos_sin, pages, slots, np.array(live, np.int32))

    turned = x[:, :, : (group + 1) * head_dim].astype(np.float64).reshape(num_rows, HEADS, 2, group + 1, half)
    turned = (turned[:, :, 0] + 1j * turned[:, :, 1]) * np.exp(1j * angles)[:, None, None]
    turned = np.concatenate([turned.real, turned.imag], axis=-1)
    got = np.asarray(q).astype(np.float64)
    np.testing.assert_allclose(got[rows], turned[rows, :, :group], rtol=2**-8, atol=1e-5)
    assert (np.delete(got, rows, axis=0) == 0).all()
    assert (np.delete(np.asarray(got_pages), here, axis=0) == UNTOUCHED).all()
    got_pages = np.asarray(got_pages)[here]
    values = got_pages.view(jnp.bfloat16).astype(np.float64)
    is_written = np.zeros((NUM_PAGES, PAGE_SIZE), bool)
    for row in rows:
        page, offset = divmod(int(slots[row]), PAGE_SIZE)
        if page < NUM_PAGES:
            is_written[page, offset] = True
            np.testing.assert_allclose(values[page, :, 0, offset], turned[row, :, group], rtol=2**-8, atol=1e-5)
            np.testing.assert_array_equal(values[page, :, 1, offset], written(x[row, :, (group + 1) * head_dim :]))
    assert (got_pages.transpose(0, 3, 1, 2, 4)[~is_written] == UNTOUCHED).all()


@pytest.mark.parametrize("nowhere", [-1, -2 * PAGE_SIZE, NUM_PAGES * PAGE_SIZE, NUM_PAGES * PAGE_SIZE + 5, 2**31 - 1])
def test_a_slot_that_is_none_is_written_nowhere(nowhere: int) -> None:
    """The layer's pages lie among those of other layers."""
    border, head_dim = 4, 32
    slots, live = np.array([0, nowhere, NUM_PAGES * PAGE_SIZE - 1], np.int32), np.array([0, 3, 3, 3], np.int32)
    x, cos_sin = np.ones((3, HEADS, 3 * head_dim), np.float32), np.ones((3, head_dim), np.float32)
    pages = np.full((NUM_PAGES + 2 * border, HEADS, 2, PAGE_SIZE, head_dim), UNTOUCHED, np.uint16)

    write = jax.jit(partial(rotate_and_write, first_page=np.int32(border), num_pages=NUM_PAGES))
    got = np.asarray(write(x, cos_sin, pages, slots, live)[1])

    touched = (got != UNTOUCHED).all(axis=(1, 2, 4))
    assert np.argwhere(touched).tolist() == [[border, 0], [border + NUM_PAGES - 1, PAGE_SIZE - 1]]
    assert (got.transpose(0, 3, 1, 2, 4)[~touched] == UNTOUCHED).all()
