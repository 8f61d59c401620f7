"""A small engine of its own: its ledger and programs are what is looked at here."""

from __future__ import annotations

from pathlib import Path

import pytest

from preble_jax.config_files import from_keywords, load_config
from preble_jax.engine.engine import Engine
from preble_jax.engine.runner import ModelRunner, make_mesh
from preble_jax.model.weights import load_params, open_checkpoint
from preble_jax.progress import NullProgress

TINY_FOLDER = Path(__file__).parent.parent / "goldens" / "tiny_llama3"


@pytest.fixture(scope="session")
def engine() -> Engine:
    import jax.numpy as jnp

    config = from_keywords(
        load_config("offline"),
        name=str(TINY_FOLDER),
        dtype="float32",
        page_size=8,
        num_pages=256,
        max_num_seqs=8,
        prefill_buckets=(64,),
    )
    checkpoint = open_checkpoint(TINY_FOLDER)
    mesh = make_mesh(1)
    model = checkpoint.model_config
    runner = ModelRunner(config, model, load_params(checkpoint, mesh, jnp.dtype("float32")), mesh)
    runner.compile(NullProgress())
    return Engine(config, runner, model.vocab_size)
