"""Page layouts: shapes and bytes a backend, and what each refuses."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import PageLayout
from kernels_pallas.layout import from_storage, page_dtype, to_storage

SIZES = {"num_pages": 3, "page_size": 16, "num_kv_heads": 2, "head_dim": 64, "dtype": jnp.bfloat16}


@pytest.mark.parametrize(
    ("backend", "head_dim", "shape"),
    [
        ("jnp", 64, (3, 2, 2, 16, 64)),
        ("gpu", 64, (3, 2, 2, 16, 64)),
        ("gpu-interpret", 128, (3, 2, 2, 16, 128)),
        ("tpu", 64, (3, 2, 1, 16, 128)),
        ("tpu", 128, (3, 2, 2, 16, 128)),
        ("tpu-interpret", 256, (3, 2, 2, 16, 256)),
    ],
)
def test_shapes(backend, head_dim, shape):
    layout = PageLayout(**SIZES | {"backend": backend, "head_dim": head_dim})
    assert layout.shape == shape
    assert layout.zeros().nbytes == 3 * layout.page_bytes == 3 * 2 * 2 * 16 * head_dim * 2


@pytest.mark.parametrize(
    ("dtype", "on_jnp"),
    [(jnp.bfloat16, "uint16"), (jnp.float8_e4m3fn, "uint8"), (jnp.int8, "int8"), (jnp.float32, "float32")],
)
def test_numbers_survive_storage(dtype, on_jnp):
    for backend, stored in (("jnp", on_jnp), ("tpu", jnp.dtype(dtype).name)):
        pages = PageLayout(**SIZES | {"dtype": dtype, "backend": backend}).zeros()
        assert pages.dtype == stored and page_dtype(pages.dtype) == dtype
        numbers = jnp.array([-3.0, 0.0, 1.0, 16.0, 96.0])
        back = from_storage(to_storage(numbers, pages))
        assert back.dtype == dtype
        np.testing.assert_array_equal(back.astype(jnp.float32), numbers)


def test_quantised_storage_rounds_and_clips():
    ints = PageLayout(**SIZES | {"dtype": jnp.int8}).zeros()
    np.testing.assert_array_equal(to_storage(jnp.array([1.6, -1.4, 300.0, -300.0]), ints), [2, -1, 127, -127])
    floats = PageLayout(**SIZES | {"dtype": jnp.float8_e4m3fn}).zeros()
    back = from_storage(to_storage(jnp.array([1e4, -1e4]), floats)).astype(jnp.float32)
    np.testing.assert_array_equal(back, [448, -448])  # and not NaN, which is what a cast makes of them


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": jnp.float16}, "page dtype: expected one of bfloat16, float32, int8, float8_e4m3fn, got float16"),
        ({"page_size": 0}, "page_size: expected at least 1, got 0"),
        ({"backend": "tpu", "page_size": 24}, r"page_size on tpu: expected one of \(16, 32, 64, 128\), got 24"),
        ({"backend": "gpu-interpret", "head_dim": 80}, r"head_dim on gpu-interpret: expected one of .*, got 80"),
        ({"backend": "triton"}, "backend: expected one of jnp"),
    ],
)
def test_what_a_backend_cannot_hold_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PageLayout(**SIZES | change)
