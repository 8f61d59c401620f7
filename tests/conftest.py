"""Fixtures for the whole suite. Four CPU devices are forced before JAX is imported, for meshes to be tested on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_FLAG = "--xla_force_host_platform_device_count=4"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", default="auto", help="attention backend of the engine's tests: jnp, tpu, gpu, ...")


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's GGUF file, fetched into the user's cache where it is not there yet."""
    from preble_jax.model.registry import resolve
    from preble_jax.progress import make_progress

    return resolve("smollm2-135m-instruct", make_progress())
