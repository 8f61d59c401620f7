"""Hugging Face folders: `config.json` beside `model.safetensors`, or beside an index and its shards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from preble_jax.errors import CheckpointError
from preble_jax.model.config import ModelConfig

if TYPE_CHECKING:
    from preble_jax.model.params import ParamSpec

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = ("float64", "float32", "float16", "bfloat16")
_SHARD_BYTES = 5 << 30

Array = np.ndarray[Any, Any]


class SafetensorsCheckpoint:
    """A Hugging Face folder. All files are opened, so that a missing or truncated shard is known at once.

    None stays open: an open one is mapped, and what was read through the map would count as this process's memory,
    beside the weights made of it, until the last tensor has been read.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        if not (self._folder / "config.json").is_file():
            raise CheckpointError(
                f"{self._folder}: expected a checkpoint folder (config.json with *.safetensors files, or one written "
                "by this project), got a folder without config.json"
            )
        generation = self._folder / "generation_config.json"
        self.model_config = ModelConfig.from_hf(
            read_json(self._folder / "config.json"), read_json(generation) if generation.is_file() else None
        )
        weight_map = self._weight_map()
        files = sorted(set(weight_map.values()))
        held = {file: frozenset(_open(self._folder / file).keys()) for file in files}
        self._files: dict[str, str] = {}  # tensor -> file's name
        for name, file in weight_map.items():
            if name not in held[file]:
                raise CheckpointError(f"{self._folder / file}: expected the tensor {name!r} that {_INDEX} puts there")
            self._files[name] = file

    def read(self, spec: ParamSpec, dtype: Any = None) -> Array:
        """The packed parameter, in the file's dtype."""
        sources = [self._read(name, shape) for name, shape in zip(spec.hf, spec.source_shapes, strict=True)]
        return spec.pack(self.model_config, sources)

    def close(self) -> None:
        """Nothing is held open."""

    def _read(self, name: str, shape: tuple[int, ...]) -> Array:
        if name not in self._files:
            raise CheckpointError(
                f"{self._folder}: expected a tensor {name!r}, which is missing among {len(self._files)}; "
                "is the folder complete?"
            )
        file = self._files[name]
        try:
            tensor: Array = _open(self._folder / file).get_tensor(name)  # a copy
        except (SafetensorError, TypeError, AttributeError) as error:  # a dtype NumPy has no name for
            raise CheckpointError(f"{self._folder / file}: cannot read tensor {name!r}: {error}") from error
        if tensor.shape != shape:
            raise CheckpointError(
                f"{self._folder / file}: expected tensor {name!r} of shape {list(shape)} (from config.json), "
                f"got {list(tensor.shape)}"
            )
        if tensor.dtype.name not in _DTYPES:
            raise CheckpointError(
                f"{self._folder / file}: expected tensor {name!r} as one of {', '.join(_DTYPES)}, "
                f"got {tensor.dtype.name}; quantised checkpoints are not supported"
            )
        return tensor

    def _weight_map(self) -> dict[str, str]:
        """Tensor name -> file name."""
        index = self._folder / _INDEX
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise CheckpointError(f"{index}: expected an object 'weight_map' of file names, got {weight_map!r:.80}")
            for file in sorted(set(weight_map.values())):
                if Path(file).name != file or not (self._folder / file).is_file():
                    raise CheckpointError(f"{self._folder}: expected the shard {file!r} that {_INDEX} names; fetch it")
            return weight_map
        if not (self._folder / _SINGLE).is_file():
            raise CheckpointError(f"{self._folder}: expected {_SINGLE} or {_INDEX} beside config.json, got neither")
        return dict.fromkeys(_open(self._folder / _SINGLE).keys(), _SINGLE)


def save_safetensors(
    folder: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    max_shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes a folder that `SafetensorsCheckpoint`, and Hugging Face transformers, read.

    params: path -> array (NumPy or JAX, sharded or not), as `load_params` makes them; their dtype is kept.
    A file is begun whenever the next tensor would take the present one past `max_shard_bytes`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(_source_tensors(config, params), max_shard_bytes))
    names = (
        [_SINGLE] if len(shards) == 1 else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in _from_one(shards)]
    )
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})  # transformers insists on a format it knows
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", config.to_hf())


def _source_tensors(config: ModelConfig, params: Mapping[str, Any]) -> Iterator[tuple[str, Array]]:
    from preble_jax.model.params import param_table  # needs JAX, which opening a folder does not

    for spec in param_table(config):
        for name, tensor in zip(spec.hf, spec.unpack(config, np.asarray(params[spec.path])), strict=True):
            yield name, np.ascontiguousarray(tensor)


def _shards(tensors: Iterable[tuple[str, Array]], max_bytes: int) -> Iterator[dict[str, Array]]:
    shard: dict[str, Array] = {}
    num_bytes = 0
    for name, tensor in tensors:
        if shard and num_bytes + tensor.nbytes > max_bytes:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = tensor
        num_bytes += tensor.nbytes
    yield shard


def _from_one(items: list[Any]) -> range:
    return range(1, len(items) + 1)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:  # the header is checked against the file's length
        raise CheckpointError(
            f"{path}: expected a whole safetensors file, got {path.stat().st_size} bytes: {error}; fetch the file again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file; CheckpointError where it is unreadable, truncated or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: bad JSON or bad UTF-8
        raise CheckpointError(f"{path}: expected a JSON object: {error}; fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
