"""Tiny models in every checkpoint format, written by the formats' own libraries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from preble_jax.model.config import ModelConfig
from preble_jax.model.params import param_table

TINY = ModelConfig(
    vocab_size=320,
    hidden_size=48,
    intermediate_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_position=128,
    tie_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
)
"""All sizes differ, so that no two axes can be confused; 4 divides what a mesh splits."""

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "Ġ Ġ", "s t", "Ċ Ċ")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def random_hf_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Hugging Face name -> float32 tensor, all different."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape).astype(np.float32)
        for spec in param_table(config)
        for name, shape in zip(spec.hf, spec.source_shapes, strict=True)
    }


def packed(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a reader must make of these Hugging Face tensors."""
    return {spec.path: spec.pack(config, [tensors[name] for name in spec.hf]) for spec in param_table(config)}


def gguf_tensors(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same under GGUF's names, queries and keys permuted as llama.cpp's converter does it."""
    renamed = {}
    for spec in param_table(config):
        for hf, name in zip(spec.hf, spec.gguf, strict=True):
            tensor = tensors[hf]
            if name.endswith("attn_q.weight"):
                tensor = llama_cpp_permute(tensor, config.num_heads)
            elif name.endswith("attn_k.weight"):
                tensor = llama_cpp_permute(tensor, config.num_kv_heads)
            renamed[name] = tensor
    return renamed


def llama_cpp_permute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """convert_hf_to_gguf.py, LlamaModel.permute."""
    return (
        weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def gguf_metadata(config: ModelConfig) -> dict[str, Any]:
    """The model's shape as a converter writes it; values are Python or NumPy scalars."""
    return {
        "llama.block_count": config.num_layers,
        "llama.context_length": config.max_position,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_dim,
    }


def tokenizer_metadata() -> dict[str, Any]:
    """A byte-level BPE tokenizer of 3 control tokens, the 256 bytes and a few merges."""
    pieces = [merge.replace(" ", "") for merge in MERGES]
    tokens = [*CONTROL_TOKENS, *_byte_alphabet(), *pieces]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(CONTROL_TOKENS) + [1] * (len(tokens) - len(CONTROL_TOKENS)),
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHATML,
    }


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any],
    types: Mapping[str, GGMLQuantizationType] | None = None,
    architecture: str = "llama",
) -> Path:
    """A GGUF file by the gguf package's own writer. `types`: tensors that are raw blocks already, and of which type."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add_metadata(writer, key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_metadata(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float64(key, value)
    else:
        writer.add_uint32(key, value)


def _byte_alphabet() -> list[str]:
    """GPT-2's characters for the bytes 0 to 255, in order (spelled out here, not taken from the code under test)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]
