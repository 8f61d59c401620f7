"""Int8 matrices: how far they are from what they were made of, and their two products from exact ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preble_jax.model.quantize import QuantizedMatrix, check_weight_format, has_int8_activations, quantize

CASES = {  # shape, axes summed over: as the matrices of a model have them
    "down": ((96, 40), (0,)),
    "qkv": ((128, 2, 20), (0,)),
    "out": ((2, 3, 64, 24), (0, 1, 2)),
    "embedding": ((50, 192), (1,)),
    "odd": ((45, 7), (0,)),
}


def random(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def inputs(rows: int, shape: tuple[int, ...], in_axes: tuple[int, ...], seed: int = 1) -> np.ndarray:
    return random((rows, *(shape[axis] for axis in in_axes)), seed)


def quantized(
    w: np.ndarray, in_axes: tuple[int, ...], dtype: str = "float32", *, int8_activations: bool = False
) -> QuantizedMatrix:
    """On the device."""
    return jax.device_put(quantize(w.astype(jnp.dtype(dtype)), in_axes, dtype, int8_activations=int8_activations))


def exact(x: np.ndarray, w: np.ndarray, in_axes: tuple[int, ...]) -> np.ndarray:
    return np.tensordot(x.astype(np.float64), w.astype(np.float64), (range(1, x.ndim), in_axes))


def dequantized(matrix: QuantizedMatrix) -> np.ndarray:
    """[out..., in...] float64."""
    scales = np.asarray(matrix.scales, np.float64)
    return np.asarray(matrix.values) * scales.reshape(*scales.shape, *(1,) * (matrix.values.ndim - scales.ndim))


def relative_error(got: object, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(sorted(CASES)),
    st.integers(0, 1000),
    st.floats(1e-6, 1e6),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_no_value_is_off_by_more_than_half_its_scale(case: str, seed: int, factor: float, dtype: str) -> None:
    shape, in_axes = CASES[case]
    given_ = (random(shape, seed) * factor).astype(jnp.dtype(dtype))
    matrix = quantize(given_, in_axes, dtype, int8_activations=False)
    out_axes = [axis for axis in range(len(shape)) if axis not in in_axes]
    ordered = np.asarray(given_, np.float64).transpose(*out_axes, *in_axes)
    scales = np.asarray(matrix.scales, np.float64)
    assert matrix.values.dtype == jnp.int8
    assert matrix.scales.dtype == jnp.float32
    assert matrix.dtype == jnp.dtype(dtype)
    assert scales.shape == tuple(shape[axis] for axis in out_axes)
    assert np.abs(np.asarray(matrix.values, np.int32)).max() == 127
    of_channel = tuple(range(len(out_axes), len(shape)))
    np.testing.assert_allclose(scales, np.abs(ordered).max(axis=of_channel) / 127, rtol=1e-6)
    error = np.abs(dequantized(matrix) - ordered).max(axis=of_channel)
    assert (error <= scales * (0.5 + 1e-4)).all()


def test_a_channel_of_zeros_stays_one() -> None:
    w = random((64, 3))
    w[:, 1] = 0.0
    x = random((4, 64), 1)
    for int8_activations in (False, True):
        matrix = quantized(w, (0,), int8_activations=int8_activations)
        got = np.asarray(matrix.matmul(jnp.asarray(x)))
        assert np.isfinite(got).all()
        assert (got[:, 1] == 0).all()
        assert (np.asarray(matrix.matmul(jnp.zeros((2, 64)))) == 0).all()


@pytest.mark.parametrize("case", CASES)
def test_product_with_exact_activations(case: str) -> None:
    """Nothing is lost but what quantising lost."""
    shape, in_axes = CASES[case]
    w, x = random(shape), inputs(5, shape, in_axes)
    matrix = quantized(w, in_axes)
    kept = dequantized(matrix)
    want = exact(x, kept, tuple(range(matrix.scales.ndim, kept.ndim)))
    got = matrix.matmul(jnp.asarray(x))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-4, atol=1e-4)
    assert relative_error(got, exact(x, w, in_axes)) < 0.012


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_product_with_int8_activations(case: str, dtype: str) -> None:
    shape, in_axes = CASES[case]
    w, x = random(shape), inputs(5, shape, in_axes)
    matrix = quantized(w, in_axes, dtype, int8_activations=True)
    got = matrix.matmul(jnp.asarray(x))
    assert got.dtype == jnp.float32
    assert relative_error(got, exact(x, w, in_axes)) < 0.02


def test_outliers_do_not_drown_the_rest_of_a_row() -> None:
    """One activation 100 times the others: a scale for it would leave them a bit and a half. What it adds is taken out
    before the error is judged, for it would hide everything else."""
    w, x = random((192, 64)), random((16, 192), 1)
    x[:, 70] = 100.0
    matrix = quantized(w, (0,), int8_activations=True)
    rest = exact(x, w, (0,)) - exact(x[:, 70:71], w[70:71], (0,))
    got = np.asarray(matrix.matmul(jnp.asarray(x)), np.float64) - exact(x[:, 70:71], w[70:71], (0,))
    assert relative_error(got, rest) < 0.12


@pytest.mark.parametrize("int8_activations", [False, True])
def test_rows_of_an_embedding_come_back(int8_activations: bool) -> None:
    w = random((50, 192))
    ids = np.asarray([3, 49, 0, 3])
    for dtype in ("float32", "bfloat16"):
        matrix = quantized(w, (1,), dtype, int8_activations=int8_activations)
        rows = matrix.rows(jnp.asarray(ids))
        assert rows.dtype == jnp.float32
        assert relative_error(rows, w[ids].astype(np.float64)) < 0.012


@pytest.mark.parametrize("case", CASES)
def test_a_row_does_not_depend_on_those_beside_it(case: str) -> None:
    """With int8 activations: to the last bit, at every number of rows."""
    shape, in_axes = CASES[case]
    matrix = quantized(random(shape), in_axes, "bfloat16", int8_activations=True)
    x = jnp.asarray(inputs(64, shape, in_axes), jnp.float32)
    product = jax.jit(QuantizedMatrix.matmul)
    together = np.asarray(product(matrix, x))
    for rows in (1, 8, 24):
        np.testing.assert_array_equal(np.asarray(product(matrix, x[:rows])), together[:rows])
    np.testing.assert_array_equal(np.asarray(product(matrix, x.at[1:].multiply(1e4)))[0], together[0])


def test_a_matrix_is_a_pytree_that_knows_its_product() -> None:
    matrix = quantized(random((64, 8)), (0,), "bfloat16", int8_activations=True)
    leaves, treedef = jax.tree.flatten(matrix)
    assert [leaf.dtype for leaf in leaves] == [jnp.int8, jnp.float32]
    again = jax.tree.unflatten(treedef, leaves)
    assert (again.dtype, again.int8_activations) == (jnp.bfloat16, True)
    assert treedef != jax.tree.structure(quantized(np.ones((64, 8)), (0,)))


def test_which_platform_takes_which_product() -> None:
    assert has_int8_activations("cpu")
    assert not has_int8_activations("tpu")
    assert not has_int8_activations("gpu")


def test_unknown_weight_formats_are_refused() -> None:
    for known in ("native", "int8"):
        check_weight_format(known)
    with pytest.raises(ValueError, match="expected one of native, int8, got 'int4'"):
        check_weight_format("int4")


@pytest.mark.parametrize("case", ["qkv", "gate_up", "out", "down", "embedding"])
def test_the_cpu_product_does_not_copy_the_weights(case: str) -> None:
    """Seen in the room that the compiled program needs besides its arguments and results."""
    shape, in_axes = {
        "qkv": ((576, 3, 320), (0,)),
        "gate_up": ((576, 2, 1536), (0,)),
        "out": ((3, 3, 64, 576), (0, 1, 2)),
        "down": ((1536, 576), (0,)),
        "embedding": ((4096, 576), (1,)),
    }[case]
    matrix = quantized(random(shape), in_axes, "bfloat16", int8_activations=True)
    x = jnp.asarray(inputs(8, shape, in_axes))
    memory = jax.jit(QuantizedMatrix.matmul).lower(matrix, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < matrix.values.nbytes / 2
