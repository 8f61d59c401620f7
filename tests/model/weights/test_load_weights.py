"""Weights onto meshes of forced host devices, from each format, and random ones; Orbax from one mesh to another."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fakes.checkpoints import (
    TINY,
    gguf_metadata,
    gguf_tensors,
    packed,
    random_hf_tensors,
    tokenizer_metadata,
    write_gguf,
)
from fakes.tokenizer import byte_tokenizer
from preble_jax import env
from preble_jax.errors import CheckpointError
from preble_jax.model.params import param_table
from preble_jax.model.tokenizer import load_tokenizer
from preble_jax.model.weights import load_params, open_checkpoint, orbax, random_params
from preble_jax.model.weights.safetensors import save_safetensors

ROOT = Path(__file__).resolve().parents[3]
EXPECTED = packed(TINY, random_hf_tensors(TINY))


def mesh_of(num_devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:num_devices]), ("tensor",))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    metadata = {**gguf_metadata(TINY), **tokenizer_metadata()}
    write_gguf(folder / "tiny.gguf", gguf_tensors(TINY, random_hf_tensors(TINY)), metadata)
    save_safetensors(folder / "hf", TINY, EXPECTED)
    orbax.save(folder / "orbax", TINY, {k: jnp.asarray(v) for k, v in EXPECTED.items()}, byte_tokenizer())
    return {"gguf": folder / "tiny.gguf", "safetensors": folder / "hf", "orbax": folder / "orbax"}


class CountingProgress:
    def __init__(self) -> None:
        self.tasks: list[list[Any]] = []

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Any]:
        counts = [description, total, 0]
        self.tasks.append(counts)

        class Task:
            def advance(self, amount: float = 1) -> None:
                counts[2] += amount

        yield Task()


@pytest.mark.parametrize("num_devices", [None, 1, 2, 4])
@pytest.mark.parametrize("kind", ["gguf", "safetensors", "orbax"])
def test_weights_arrive_whole_and_split_as_the_table_says(
    kind: str, num_devices: int | None, checkpoints: dict[str, Path]
) -> None:
    mesh = None if num_devices is None else mesh_of(num_devices)
    progress = CountingProgress()
    params = load_params(open_checkpoint(checkpoints[kind]), mesh, jnp.float32, progress)
    assert progress.tasks == [["reading weights", len(EXPECTED), len(EXPECTED)]]
    assert set(params) == set(EXPECTED)
    for path, array in params.items():
        np.testing.assert_array_equal(np.asarray(array), EXPECTED[path], err_msg=path)
    qkv = params["layers.0.qkv"]
    assert len(qkv.sharding.device_set) == (num_devices or 1)
    shard_shapes = {shard.data.shape for shard in qkv.addressable_shards}
    assert shard_shapes == {(48, 4 // (num_devices or 1), 4 * 8)}
    if num_devices == 4:
        assert params["layers.0.down"].sharding.spec == P("tensor", None)
        assert params["embedding"].addressable_shards[0].data.shape == (80, 48)
        assert params["final_norm"].sharding.is_fully_replicated


@pytest.mark.parametrize("kind", ["gguf", "safetensors", "orbax"])
def test_matrices_take_the_engines_dtype_and_norms_stay_float32(kind: str, checkpoints: dict[str, Path]) -> None:
    params = load_params(open_checkpoint(checkpoints[kind]), mesh_of(2), jnp.bfloat16)
    for spec in param_table(TINY):
        assert params[spec.path].dtype == (jnp.float32 if "norm" in spec.path else jnp.bfloat16), spec.path
        np.testing.assert_array_equal(
            np.asarray(params[spec.path]), EXPECTED[spec.path].astype(params[spec.path].dtype), err_msg=spec.path
        )


def test_random_weights_do_not_depend_on_the_mesh_and_do_on_the_seed() -> None:
    alone = random_params(TINY, 7, jnp.bfloat16)
    split = random_params(TINY, 7, jnp.bfloat16, mesh_of(4))
    other = random_params(TINY, 8, jnp.bfloat16)
    assert {path: (a.shape, a.dtype) for path, a in alone.items()} == {
        spec.path: (spec.shape, spec.dtype(jnp.bfloat16)) for spec in param_table(TINY)
    }
    for path, array in alone.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(split[path]), err_msg=path)
    assert len(split["lm_head"].addressable_shards) == 4
    matrices = {path: np.asarray(a, np.float32) for path, a in alone.items() if "norm" not in path}
    for path, values in matrices.items():
        assert 0.015 < values.std() < 0.025, path
        assert (values != np.asarray(other[path], np.float32)).any(), path
    assert (matrices["layers.0.qkv"] != matrices["layers.1.qkv"]).any()
    assert (np.asarray(alone["final_norm"]) == 1).all()


@pytest.mark.parametrize(("saved_on", "restored_on"), [(4, 2), (2, 4), (1, 4), (4, None)])
def test_orbax_restores_onto_another_mesh(saved_on: int, restored_on: int | None, tmp_path: Path) -> None:
    saved = random_params(TINY, 3, jnp.bfloat16, mesh_of(saved_on))
    orbax.save(tmp_path / "m", TINY, saved)
    mesh = None if restored_on is None else mesh_of(restored_on)
    restored = load_params(open_checkpoint(tmp_path / "m"), mesh, jnp.bfloat16)
    for path, array in restored.items():
        assert len(array.sharding.device_set) == (restored_on or 1)
        assert array.dtype == saved[path].dtype
        np.testing.assert_array_equal(np.asarray(array), np.asarray(saved[path]), err_msg=path)


def test_orbax_folder_is_complete(checkpoints: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(checkpoints["orbax"])
    assert checkpoint.model_config == TINY
    for spec in param_table(TINY):
        np.testing.assert_array_equal(checkpoint.read(spec), EXPECTED[spec.path])
    tokenizer = load_tokenizer(checkpoints["orbax"])
    assert tokenizer.encode("hé<|im_end|>", parse_special=True)[-1] == 257
    assert tokenizer.chat_template == byte_tokenizer().chat_template


def test_orbax_refuses_to_overwrite_and_to_save_half_a_model(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    params = {path: jnp.asarray(value) for path, value in EXPECTED.items()}
    with pytest.raises(CheckpointError, match="without parameters"):
        orbax.save(checkpoints["orbax"], TINY, params)
    del params["layers.1.out"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.out"):
        orbax.save(tmp_path / "half", TINY, params)
    assert not (tmp_path / "half").exists()


def test_damaged_orbax_folders_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return shutil.copytree(checkpoints["orbax"], tmp_path / name)

    other = copy("other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(CheckpointError, match=r"layers\.0\.gate_up.*\[48, 2, 128\].*got \[48, 2, 64\]"):
        load_params(open_checkpoint(other), None, jnp.float32)
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"layers\.2\.\w+', which is missing"):
        load_params(open_checkpoint(other), None, jnp.float32)
    (other / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(other)

    no_metadata = copy("no_metadata")
    (no_metadata / "params" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="readable Orbax parameters"):
        load_params(open_checkpoint(no_metadata), None, jnp.float32)


READ_ALL = """
import sys
import jax.numpy as jnp
from preble_jax import env
from preble_jax.errors import CheckpointError
from preble_jax.model.weights import load_params, open_checkpoint
try:
    load_params(open_checkpoint(sys.argv[1]), None, jnp.float32)
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("truncated", ["manifest.ocdbt", "d"])
def test_truncated_orbax_folders_are_refused(truncated: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """In a process of its own: several reads fail at once, and Orbax leaves the later ones' errors to its threads."""
    folder = shutil.copytree(checkpoints["orbax"], tmp_path / "cut")
    for file in (folder / "params").rglob("*"):
        if file.is_dir() or (file.name if truncated == "manifest.ocdbt" else file.parent.name) != truncated:
            continue
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    child_env = env.child_environment({"PYTHONPATH": str(ROOT)})
    child = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(folder)], env=child_env, capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr
    assert "expected readable Orbax parameters" in child.stdout
    assert "cut/params" in child.stdout


def test_a_missing_tensor_stops_the_loading(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tensors = gguf_tensors(TINY, random_hf_tensors(TINY))
    del tensors["blk.1.ffn_norm.weight"]
    path = write_gguf(tmp_path / "m.gguf", tensors, gguf_metadata(TINY))
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_norm\.weight"):
        load_params(open_checkpoint(path), None, jnp.float32)


def test_the_default_model_loads(default_model: Path) -> None:
    params = load_params(open_checkpoint(default_model), None, jnp.float32)
    assert sum(a.size for a in params.values()) == 134_515_008  # what its model card says: 135M
    assert all(bool(jnp.isfinite(a).all()) for a in params.values())
