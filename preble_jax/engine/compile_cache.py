"""JAX's persistent compilation cache: the second start finds its programs on disk."""

from __future__ import annotations

from pathlib import Path

import jax


def enable_compile_cache(cache_dir: Path) -> None:
    """Keeps compiled programs under `cache_dir`, unless the user has already chosen a place."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
