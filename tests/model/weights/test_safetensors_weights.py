"""Hugging Face folders: whole, sharded, and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from fakes.checkpoints import TINY, packed, random_hf_tensors
from preble_jax.errors import CheckpointError
from preble_jax.model.params import param_table
from preble_jax.model.weights import open_checkpoint
from preble_jax.model.weights.safetensors import save_safetensors

INDEX = "model.safetensors.index.json"
SPECS = {spec.path: spec for spec in param_table(TINY)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file, written as others write it: by the safetensors library, from Hugging Face's names."""
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf()))
    save_file(random_hf_tensors(TINY), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_safetensors(tmp_path, TINY, packed(TINY, random_hf_tensors(TINY)), max_shard_bytes=60_000)
    return tmp_path


def assert_reads_back(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.model_config == TINY
    for path, expected in packed(TINY, random_hf_tensors(TINY)).items():
        np.testing.assert_array_equal(checkpoint.read(SPECS[path]), expected, err_msg=path)
    checkpoint.close()


def test_one_file(folder: Path) -> None:
    assert_reads_back(folder)


def test_shards(sharded: Path) -> None:
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert not (sharded / "model.safetensors").exists()
    assert_reads_back(sharded)


def test_written_tensors_carry_hugging_faces_names_and_layout(tmp_path: Path) -> None:
    tensors = random_hf_tensors(TINY)
    save_safetensors(tmp_path, TINY, packed(TINY, tensors))
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert set(file.keys()) == set(tensors)
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(file.get_tensor(name), tensor)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_keeps_its_dtype(dtype: type, folder: Path) -> None:
    tensors = {name: tensor.astype(dtype) for name, tensor in random_hf_tensors(TINY).items()}
    save_file(tensors, folder / "model.safetensors")
    read = open_checkpoint(folder).read(SPECS["layers.0.qkv"])
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, packed(TINY, tensors)["layers.0.qkv"])


def test_missing_tensor_wrong_shape_and_wrong_dtype_are_named(folder: Path) -> None:
    tensors = random_hf_tensors(TINY)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((64, 40), np.float32)
    tensors["lm_head.weight"] = np.zeros((320, 48), np.int8)  # type: ignore[assignment]
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight', which is missing"):
        checkpoint.read(SPECS["final_norm"])
    with pytest.raises(CheckpointError, match=r"up_proj\.weight' of shape \[64, 48\].* got \[64, 40\]"):
        checkpoint.read(SPECS["layers.0.gate_up"])
    with pytest.raises(CheckpointError, match=r"lm_head\.weight'.* got int8"):
        checkpoint.read(SPECS["lm_head"])


def test_a_file_cut_anywhere_is_refused_when_it_is_opened(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for cut in [*range(64), *range(64, len(whole), 1999), *range(len(whole) - 8, len(whole))]:
        file.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=rf"model\.safetensors.* got {cut} bytes"):
            open_checkpoint(folder)
    file.write_bytes(whole)
    assert_reads_back(folder)


def test_missing_and_truncated_shards_are_named_when_opened(sharded: Path) -> None:
    second = sorted(sharded.glob("*.safetensors"))[1]
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=second.name):
        open_checkpoint(sharded)
    second.unlink()
    with pytest.raises(CheckpointError, match=f"expected the shard '{second.name}'"):
        open_checkpoint(sharded)


def test_an_index_that_lies_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][name] = last
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"expected the tensor '{name}'"):
        open_checkpoint(sharded)
    index["weight_map"][name] = "../../etc/passwd"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="expected the shard"):
        open_checkpoint(sharded)
    for content in ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight'):
        (sharded / INDEX).write_text(content)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            open_checkpoint(sharded)


def test_what_is_no_checkpoint_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(CheckpointError, match=r"without config\.json"):
        open_checkpoint(tmp_path_factory.mktemp("empty"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="got neither"):
        open_checkpoint(folder)
    for content in (b"", b"{", b"[1]", b"\xff\xfe"):
        (folder / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"config\.json: expected a JSON object"):
            open_checkpoint(folder)
