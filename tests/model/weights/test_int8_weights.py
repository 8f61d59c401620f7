"""Int8 matrices made while weights are read: the same ones from every format, on every mesh, and of random weights."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fakes.checkpoints import TINY, gguf_metadata, gguf_tensors, packed, random_hf_tensors, write_gguf
from preble_jax.model.params import ParamSpec, param_table
from preble_jax.model.quantize import QuantizedMatrix, Weight, quantize
from preble_jax.model.weights import load_params, open_checkpoint, orbax, random_params
from preble_jax.model.weights.safetensors import save_safetensors

# A reader may round to the engine's dtype before quantising, or not: it makes no difference here.
TENSORS = {name: t.astype(jnp.bfloat16).astype(np.float32) for name, t in random_hf_tensors(TINY).items()}
SPECS = {spec.path: spec for spec in param_table(TINY)}
KINDS = ("gguf", "safetensors", "orbax")


def mesh_of(num_devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:num_devices]), ("tensor",))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, params = tmp_path_factory.mktemp("checkpoints"), packed(TINY, TENSORS)
    write_gguf(folder / "tiny.gguf", gguf_tensors(TINY, TENSORS), gguf_metadata(TINY))
    save_safetensors(folder / "hf", TINY, params)
    orbax.save(folder / "orbax", TINY, {path: jnp.asarray(value) for path, value in params.items()})
    return {"gguf": folder / "tiny.gguf", "safetensors": folder / "hf", "orbax": folder / "orbax"}


@pytest.fixture(scope="module")
def expected() -> dict[str, Weight]:
    """Made of the whole tensors, in bfloat16, on one device."""

    def make(spec: ParamSpec, value: np.ndarray) -> Weight:
        param = value.astype(spec.dtype(jnp.bfloat16))
        return quantize(param, spec.in_axes, jnp.bfloat16, int8_activations=True) if spec.in_axes else param

    return {path: make(SPECS[path], value) for path, value in packed(TINY, TENSORS).items()}


def assert_same(params: dict[str, Weight], expected: dict[str, Weight]) -> None:
    assert list(params) == list(expected)
    for path, want in expected.items():
        assert jax.tree.structure(params[path]) == jax.tree.structure(want), path
        for got, value in zip(jax.tree.leaves(params[path]), jax.tree.leaves(want), strict=True):
            assert isinstance(got, jax.Array)
            np.testing.assert_array_equal(np.asarray(got), np.asarray(value), err_msg=path)


@pytest.mark.parametrize("num_devices", [None, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_on_every_mesh(
    kind: str, num_devices: int | None, checkpoints: dict[str, Path], expected: dict[str, Weight]
) -> None:
    mesh = None if num_devices is None else mesh_of(num_devices)
    params = load_params(open_checkpoint(checkpoints[kind]), mesh, jnp.bfloat16, weight_format="int8")
    assert_same(params, expected)
    assert {path for path, param in params.items() if isinstance(param, QuantizedMatrix)} == {
        path for path in SPECS if "norm" not in path
    }
    if num_devices == 2:
        assert_split_over_two(params)


def assert_split_over_two(params: dict[str, Weight]) -> None:
    """Values and scales along the same axes: key heads, the intermediate size, the vocabulary."""
    specs = {
        "layers.0.qkv": (P("tensor", None, None), P("tensor", None)),
        "layers.0.out": (P(None, "tensor", None, None), P(None)),
        "layers.1.gate_up": (P(None, "tensor", None), P(None, "tensor")),
        "layers.1.down": (P(None, "tensor"), P(None)),
        "embedding": (P("tensor", None), P("tensor")),
        "lm_head": (P("tensor", None), P("tensor")),
    }
    for path, (values, scales) in specs.items():
        matrix = params[path]
        assert isinstance(matrix, QuantizedMatrix)
        assert (matrix.values.sharding.spec, matrix.scales.sharding.spec) == (values, scales), path


def test_random_weights_are_quantized_too() -> None:
    native = random_params(TINY, 7, jnp.bfloat16)
    alone = random_params(TINY, 7, jnp.bfloat16, weight_format="int8")
    want = {
        path: quantize(np.asarray(param), SPECS[path].in_axes, jnp.bfloat16, int8_activations=True)
        if SPECS[path].in_axes
        else param
        for path, param in native.items()
    }
    assert_same(alone, want)
    assert_same(random_params(TINY, 7, jnp.bfloat16, mesh_of(2), weight_format="int8"), want)


def test_half_the_bytes() -> None:
    native, int8 = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(random_params(TINY, 0, jnp.bfloat16, weight_format=name)))
        for name in ("native", "int8")
    )
    assert int8 < 0.6 * native  # the scales count for more in a model as narrow as this


def test_unknown_weight_formats_are_refused_before_anything_is_read(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="expected one of native, int8, got 'fp4'"):
        load_params(open_checkpoint(checkpoints["gguf"]), None, jnp.bfloat16, weight_format="fp4")
    with pytest.raises(ValueError, match="expected one of native, int8, got 'fp4'"):
        random_params(TINY, 0, jnp.bfloat16, weight_format="fp4")
