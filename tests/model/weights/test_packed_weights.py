"""Matrices laid out for the CPU's kernels while weights are read: their products are those of the plain matrices."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from fakes.checkpoints import TINY, gguf_metadata, gguf_tensors, packed, random_hf_tensors, write_gguf
from preble_jax.model.packed import PackedMatrix
from preble_jax.model.packed_int8 import PackedInt8Matrix
from preble_jax.model.params import param_table
from preble_jax.model.quantize import QuantizedMatrix
from preble_jax.model.weights import load_params, open_checkpoint, orbax, random_params

TENSORS = {name: t.astype(jnp.bfloat16).astype(np.float32) for name, t in random_hf_tensors(TINY).items()}
LIVE = jnp.array([0, 3, 3, 3], jnp.int32)


@pytest.fixture(scope="module", params=["gguf", "orbax"])
def params(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    file = tmp_path_factory.mktemp("checkpoints") / request.param
    if request.param == "gguf":
        file = write_gguf(file.with_suffix(".gguf"), gguf_tensors(TINY, TENSORS), gguf_metadata(TINY))
    else:
        orbax.save(file, TINY, {path: jnp.asarray(value) for path, value in packed(TINY, TENSORS).items()})
    return load_params(open_checkpoint(Path(file)), None, jnp.bfloat16, packed=True)


def test_products_and_rows(params: dict) -> None:
    plain = packed(TINY, TENSORS)
    specs = [spec for spec in param_table(TINY) if ".1." not in spec.path]
    assert {path for path, param in params.items() if isinstance(param, PackedMatrix)} == {
        spec.path for spec in param_table(TINY) if spec.in_axes
    }
    for spec in specs:
        matrix, value = params[spec.path], plain[spec.path].astype(np.float64)
        if not spec.in_axes:
            np.testing.assert_array_equal(np.asarray(matrix), value)
            continue
        in_shape = tuple(spec.shape[axis] for axis in spec.in_axes)
        x = np.random.default_rng(0).standard_normal((3, *in_shape)).astype(jnp.bfloat16)
        want = np.tensordot(x.astype(np.float64), value, axes=(tuple(range(1, x.ndim)), spec.in_axes))
        if spec.gated:
            assert matrix.interleaved
            ones = jnp.ones(in_shape, jnp.float32)
            unit = (x.astype(np.float64) / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True))).astype(
                jnp.bfloat16
            )
            gate, up = np.moveaxis(np.tensordot(unit.astype(np.float64), value, axes=(1, 0)), 1, 0)
            want = gate / (1 + np.exp(-gate)) * up
            got = matrix.swiglu(jnp.asarray(x, jnp.float32), (ones, 0.0), LIVE)
            np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=1e-2 * np.abs(want).max())
            continue
        got = np.asarray(matrix.matmul(jnp.asarray(x), LIVE))
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max(), err_msg=spec.path)
        if spec.path == "embedding":
            indices = np.array([0, 5, TINY.vocab_size - 1], np.int32)
            np.testing.assert_array_equal(np.asarray(matrix.rows(jnp.asarray(indices))), value[indices])


def test_int8_matrices_are_what_they_are_for_xla() -> None:
    """Whole numbers, whose transforms are exact: the same integers, and float32 products, to the last bit."""
    plain, matrices = (
        random_params(TINY, 0, jnp.bfloat16, weight_format="int8", packed=packed) for packed in (False, True)
    )
    for spec in param_table(TINY):
        if not spec.in_axes or ".1." in spec.path:
            continue
        matrix, want = matrices[spec.path], plain[spec.path]
        assert isinstance(matrix, PackedInt8Matrix)
        assert isinstance(want, QuantizedMatrix)
        in_shape = tuple(spec.shape[axis] for axis in spec.in_axes)
        x = jnp.asarray(np.random.default_rng(0).integers(-9, 10, (3, *in_shape)), jnp.float32)
        if spec.gated:
            unit = x / jnp.sqrt(jnp.mean(x * x, axis=1, keepdims=True))
            gate, up = np.moveaxis(np.asarray(want.matmul(unit)), 1, 0)
            got = np.asarray(matrix.swiglu(x, (jnp.ones(in_shape), 0.0), LIVE), np.float32)
            np.testing.assert_allclose(got, gate / (1 + np.exp(-gate)) * up, rtol=0, atol=1e-2 * np.abs(got).max())
            continue
        np.testing.assert_array_equal(np.asarray(matrix.matmul(x, LIVE)), np.asarray(want.matmul(x)), err_msg=spec.path)
        if spec.path == "embedding":
            indices = jnp.array([0, 5, TINY.vocab_size - 1], jnp.int32)
            np.testing.assert_array_equal(np.asarray(matrix.rows(indices)), np.asarray(want.rows(indices)))
