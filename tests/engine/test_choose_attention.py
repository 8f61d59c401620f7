"""Which backend serves a model: limits become configuration errors, or a fall back where nobody named one."""

from __future__ import annotations

import logging

import pytest

from preble_jax.config import Config
from preble_jax.config_files import from_keywords
from preble_jax.engine import attention
from preble_jax.engine.attention import choose_attention
from preble_jax.engine.runner import make_mesh
from preble_jax.engine.shapes import StepShapes
from preble_jax.errors import ConfigError
from preble_jax.model.config import ModelConfig

MODEL = ModelConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=80,
    max_position=512,
)


def choose(**settings: object) -> attention.Attention:
    config = from_keywords(Config(), **{"num_pages": 8, "dtype": "bfloat16", **settings})
    return choose_attention(config, MODEL, make_mesh(1), StepShapes(config.engine))


def test_a_backend_asked_for_by_name_must_serve():
    with pytest.raises(ConfigError, match=r"engine.attention, backend tpu-interpret: .*80"):
        choose(attention="tpu-interpret")


def test_one_that_was_picked_gives_way(monkeypatch, caplog):
    monkeypatch.setattr(attention, "resolve_backend", lambda name, device: "tpu-interpret")
    caplog.set_level(logging.WARNING)
    assert choose().backend == "jnp"
    assert "tpu-interpret cannot serve this" in caplog.text and "80" in caplog.text


def test_the_environment_comes_first(monkeypatch):
    monkeypatch.setenv("PREBLE_ATTENTION", "jnp")
    assert choose(attention="tpu-interpret").backend == "jnp"
    monkeypatch.setenv("PREBLE_ATTENTION", "cuda")
    with pytest.raises(ConfigError, match="expected auto or one of jnp"):
        choose()


def test_short_memory_is_not_blamed_on_the_backend():
    with pytest.raises(ConfigError, match=r"^kv"):
        choose(num_pages=1)


def test_sequences_are_no_longer_than_the_pool():
    assert choose(max_model_len=100).max_model_len == 100
    assert choose().max_model_len == 8 * 16
    assert choose().pages_per_seq == 8
    assert choose(shared_prefix=False).planner is None
