"""Compiled programs on disk, which processes that start together write and read at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from kernels_pallas.cpu import jit
from preble_jax.engine.compile_cache import cache_folder, enable_compile_cache, num_from_cache

_NAMES = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(jit, "_folder", None)
    before = {name: getattr(jax.config, name) for name in _NAMES}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    enable_compile_cache(tmp_path)
    yield tmp_path / "xla"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compiled_sum() -> float:
    return float(jax.jit(lambda x: (x * 3.0 + 1.0).sum()).lower(jnp.ones(7)).compile()(jnp.ones(7)))


def test_an_entry_that_is_half_there_is_compiled(folder: Path) -> None:
    assert compiled_sum() == 28.0
    assert cache_folder() == str(folder)
    entries = list(folder.glob("*-cache"))
    assert entries
    before = num_from_cache()
    assert compiled_sum() == 28.0
    assert num_from_cache() > before, "whole entries are used"
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:-100])
    before = num_from_cache()
    assert compiled_sum() == 28.0
    assert num_from_cache() == before
