"""GGUF files as checkpoints: llama.cpp's names, and its own order of the rows of query and key matrices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from preble_jax.errors import CheckpointError
from preble_jax.model.config import LinearRopeScaling, ModelConfig, RopeScaling
from preble_jax.model.weights.gguf_file import GGUFFile

if TYPE_CHECKING:
    from preble_jax.model.params import ParamSpec

_ROPE_FACTORS = "rope_freqs.weight"
_BIASES = (
    "attn_q.bias",
    "attn_k.bias",
    "attn_v.bias",
    "attn_output.bias",
    "ffn_gate.bias",
    "ffn_up.bias",
    "ffn_down.bias",
)


class GGUFCheckpoint:
    """A `.gguf` file of architecture "llama". Raises CheckpointError for anything else."""

    def __init__(self, path: str | Path) -> None:
        self._file = GGUFFile(path)
        try:
            self.model_config = config_from_gguf(self._file)
        except CheckpointError:
            self._file.close()
            raise

    def read(self, spec: ParamSpec, dtype: Any = None) -> np.ndarray[Any, Any]:
        """The packed parameter, in `dtype` (None: float32)."""
        sources = []
        for name, shape in zip(spec.gguf, spec.source_shapes, strict=True):
            tensor = self._file.read(name, np.float32 if dtype is None else dtype)
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{self._file.path}: expected tensor {name!r} of shape {list(shape)} (from the metadata), "
                    f"got {list(tensor.shape)}"
                )
            sources.append(self._unpermuted(name, tensor))
        return spec.pack(self.model_config, sources)

    def close(self) -> None:
        self._file.close()

    def _unpermuted(self, name: str, tensor: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Rows of a query or key head back in Hugging Face's order.

        llama.cpp rotates neighbouring rows (0, 1), (2, 3), ...; this project, as Hugging Face, rotates row i with row
        i + head_dim / 2. The converter permuted the rows for it (llama.cpp, convert_hf_to_gguf.py, `permute`).
        """
        if not name.endswith(("attn_q.weight", "attn_k.weight")):
            return tensor
        pairs = tensor.reshape(-1, self.model_config.head_dim // 2, 2, tensor.shape[-1])
        return pairs.swapaxes(1, 2).reshape(tensor.shape)


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """The model's shape from the file's metadata. CheckpointError names what is missing or not supported."""
    meta = _Metadata(file)
    architecture = meta.get("general.architecture", str)
    if architecture != "llama":
        raise CheckpointError(
            f"{file.path}: expected general.architecture 'llama', got {architecture!r}; "
            "only Llama-family decoders can be served"
        )
    _refuse_unsupported(file, meta)
    num_heads = meta.get("llama.attention.head_count", int)
    hidden_size = meta.get("llama.embedding_length", int)
    head_dim = meta.get("llama.attention.key_length", int, hidden_size // max(num_heads, 1))
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if meta.get(key, int, head_dim) != head_dim:
            raise CheckpointError(
                f"{file.path}: expected {key} to be the head size {head_dim}, got {file.metadata[key]}"
            )
    num_layers = meta.get("llama.block_count", int)
    if f"blk.{num_layers - 1}.attn_norm.weight" not in file.tensors:
        raise CheckpointError(f"{file.path}: expected {num_layers} layers, got no tensors of the last one")
    embedding = file.tensors.get("token_embd.weight")
    factors = tuple(file.read(_ROPE_FACTORS).tolist()) if _ROPE_FACTORS in file.tensors else None
    return ModelConfig(
        vocab_size=embedding.shape[0] if embedding is not None else meta.get("llama.vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=meta.get("llama.feed_forward_length", int),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=meta.get("llama.attention.head_count_kv", int, num_heads),
        head_dim=head_dim,
        max_position=meta.get("llama.context_length", int),
        rms_norm_eps=meta.get("llama.attention.layer_norm_rms_epsilon", float),
        rope_theta=meta.get("llama.rope.freq_base", float, 10_000.0),
        rope_scaling=_rope_scaling(file, meta),
        rope_freq_factors=factors,
        tie_embeddings="output.weight" not in file.tensors,
        bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=eos_token_ids(file.metadata),
    )


def eos_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """End of sequence, of turn, and of message: each of them ends an answer."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(int(metadata[key]) for key in keys if key in metadata))


class _Metadata:
    """Typed access to a file's metadata."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`. Per-layer lists of one repeated number count as that number; float takes an int."""
        value = self._file.metadata.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self._file.path}: expected the metadata key {key!r}, which is missing")
            return default
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise CheckpointError(f"{self._file.path}: expected {key} to be of type {kind.__name__}, got {value!r}")
        return value


def _refuse_unsupported(file: GGUFFile, meta: _Metadata) -> None:
    if meta.get("split.count", int, 1) > 1:
        raise CheckpointError(
            f"{file.path}: expected a model in one file, got one of {file.metadata['split.count']} parts; "
            "merge them with llama.cpp's llama-gguf-split --merge"
        )
    if meta.get("llama.expert_count", int, 0) > 0:
        raise CheckpointError(f"{file.path}: mixture-of-experts models are not supported")
    for bias in _BIASES:
        if f"blk.0.{bias}" in file.tensors:
            raise CheckpointError(f"{file.path}: expected a model without biases, got the tensor 'blk.0.{bias}'")


def _rope_scaling(file: GGUFFile, meta: _Metadata) -> RopeScaling | None:
    """Llama 3's scaling is not here: GGUF carries it as `rope_freqs.weight`."""
    kind = meta.get("llama.rope.scaling.type", str, "none")
    if kind == "none":
        return None
    if kind == "linear":
        return LinearRopeScaling(factor=meta.get("llama.rope.scaling.factor", float))
    raise CheckpointError(f"{file.path}: expected llama.rope.scaling.type 'none' or 'linear', got {kind!r}")
