"""A small random model on a small engine: everything real but the size."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
import pytest

from preble_jax.config import Config
from preble_jax.config_files import from_keywords
from preble_jax.engine.engine import Engine
from preble_jax.engine.runner import ModelRunner, make_mesh
from preble_jax.model.config import ModelConfig
from preble_jax.model.packed import can_pack
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
# Sizes that the Pallas backends serve too. In float32 where they can: the tests compare tokens.
KERNEL_TINY = replace(TINY, num_layers=1, head_dim=64)
SETTINGS = {
    "dtype": "float32",
    "page_size": 8,
    "num_pages": 256,
    "max_num_seqs": 16,
    "decode_buckets": (16,),
    "prefill_buckets": (64,),
    "max_prefill_seqs": 4,
}
KERNEL_SETTINGS = {
    "tpu": {**SETTINGS, "page_size": 16},
    "gpu": {**SETTINGS, "page_size": 16, "dtype": "bfloat16"},
}
# What a PageLayout, or a backend's `check`, says of a size or dtype that it cannot serve.
_SIZE_ERROR = r"\b(page_size|head_dim|pages) on "


@pytest.fixture(scope="session")
def make_engine(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    """Engines by settings; those that compile to the same programs share them, and weights; the cache starts empty.

    With `--backend` of a Pallas kernel they have sizes that it serves; a test that asks for others is skipped.
    """
    runners: dict[Config, ModelRunner] = {}
    backend = request.config.getoption("--backend")
    defaults = KERNEL_SETTINGS.get(backend.removesuffix("-interpret"))
    model = TINY if defaults is None else KERNEL_TINY

    def make_runner(config: Config) -> ModelRunner:
        mesh = make_mesh(config.mesh.tensor)
        dtype = jnp.dtype(config.model.dtype)
        packed = config.engine.cpu_kernels == "auto" and can_pack(dtype, mesh, config.model.weight_format)
        params = random_params(model, 3, dtype, mesh, config.model.weight_format, packed=packed)
        try:
            runner = ModelRunner(config, model, params, mesh)
            runner.compile(NullProgress())
        except ValueError as error:  # ConfigError too
            if defaults is None or not re.search(_SIZE_ERROR, str(error)):
                raise
            pytest.skip(f"--backend {backend}: {error}")
        return runner

    def make(**settings: object) -> Engine:
        config = from_keywords(Config(), **{**(defaults or SETTINGS), "attention": backend, **settings})
        key = from_keywords(config, prefix_cache=True)  # no part of any program
        if key not in runners:
            runners[key] = make_runner(config)
        return Engine(config, runners[key], model.vocab_size)

    return make
