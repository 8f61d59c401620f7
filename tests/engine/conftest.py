"""A small random model on a small engine: everything real but the size."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import pytest

from preble_jax.config import Config
from preble_jax.config_files import from_keywords
from preble_jax.engine.engine import Engine
from preble_jax.engine.runner import ModelRunner, make_mesh
from preble_jax.model.config import ModelConfig
from preble_jax.model.weights import random_params
from preble_jax.progress import NullProgress

TINY = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    max_position=1024,
)
SETTINGS = {
    "dtype": "float32",
    "page_size": 8,
    "num_pages": 256,
    "max_num_seqs": 16,
    "decode_buckets": (16,),
    "prefill_buckets": (64,),
    "max_prefill_seqs": 4,
}


@pytest.fixture(scope="session")
def make_engine(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    """Engines by settings; those that compile to the same programs share them, and weights; the cache starts empty."""
    runners: dict[Config, ModelRunner] = {}
    backend = request.config.getoption("--backend")

    def make(**settings: object) -> Engine:
        config = from_keywords(Config(), **{**SETTINGS, "attention": backend, **settings})
        key = from_keywords(config, prefix_cache=True)  # no part of any program
        if key not in runners:
            mesh = make_mesh(config.mesh.tensor)
            params = random_params(TINY, 3, jnp.dtype(config.model.dtype), mesh, config.model.weight_format)
            runners[key] = ModelRunner(config, TINY, params, mesh)
            runners[key].compile(NullProgress())
        return Engine(config, runners[key], TINY.vocab_size)

    return make
