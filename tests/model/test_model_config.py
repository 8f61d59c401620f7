"""config.json: what is read, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fakes.checkpoints import TINY
from preble_jax.errors import CheckpointError
from preble_jax.model.config import LinearRopeScaling, Llama3RopeScaling, ModelConfig

LLAMA_32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
"""As Meta publishes it with Llama-3.2-1B-Instruct."""


def test_llama_3() -> None:
    assert ModelConfig.from_hf(LLAMA_32_1B) == ModelConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        max_position=131072,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling=Llama3RopeScaling(
            factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
        ),
        tie_embeddings=True,
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    )


def test_newer_files_keep_rope_in_one_section() -> None:
    section = {**LLAMA_32_1B["rope_scaling"], "rope_theta": 500000.0}  # type: ignore[dict-item]
    newer = {k: v for k, v in LLAMA_32_1B.items() if k not in ("rope_scaling", "rope_theta")}
    assert ModelConfig.from_hf(newer | {"rope_parameters": section}) == ModelConfig.from_hf(LLAMA_32_1B)


def test_defaults_of_old_files() -> None:
    old = {
        key: LLAMA_32_1B[key]
        for key in ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    } | {"num_attention_heads": 16, "max_position_embeddings": 2048, "eos_token_id": 2}
    config = ModelConfig.from_hf(old)
    assert (config.num_kv_heads, config.head_dim, config.num_query_groups) == (16, 128, 1)
    assert (config.rope_theta, config.rope_scaling, config.tie_embeddings) == (10_000.0, None, False)
    assert (config.bos_token_id, config.eos_token_ids) == (None, (2,))


def test_generation_config_adds_end_ids() -> None:
    config = ModelConfig.from_hf(LLAMA_32_1B, {"eos_token_id": [7, 128008]})
    assert config.eos_token_ids == (7, 128008, 128001, 128009)


@pytest.mark.parametrize("legacy_key", ["type", "rope_type"])
def test_linear_scaling(legacy_key: str) -> None:
    config = ModelConfig.from_hf(LLAMA_32_1B | {"rope_scaling": {legacy_key: "linear", "factor": 4}})
    assert config.rope_scaling == LinearRopeScaling(factor=4.0)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, rope_scaling=LinearRopeScaling(factor=2.0), bos_token_id=None, eos_token_ids=()),
        replace(TINY, rope_freq_factors=(1.0, 2.0, 4.0, 8.0), tie_embeddings=True),
        ModelConfig.from_hf(LLAMA_32_1B),
    ],
)
def test_written_configs_are_read_back(config: ModelConfig) -> None:
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [None, "12", 1.5, True, 0, -3])
def test_missing_and_ill_typed_sizes_are_named(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=key.replace("num_hidden_layers", "num_(hidden_)?layers")):
        ModelConfig.from_hf(LLAMA_32_1B | {key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_freq_factors": "abc"}, "rope_freq_factors"),
        ({"rope_freq_factors": [1.0, "x"]}, "rope_freq_factors"),
        ({"eos_token_id": 10**9}, "below 128256, got 1000000000"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 2.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            },
            "low_freq_factor < high_freq_factor",
        ),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"num_key_value_heads": 5}, "multiple of num_kv_heads"),
        ({"num_attention_heads": 0}, "num_heads"),
        ({"head_dim": 63}, "even head_dim"),
        ({"rope_freq_factors": [1.0]}, "32 rotary frequency factors"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_hf(LLAMA_32_1B | changes)
