"""Compilation: JAX's persistent cache, with which the second start finds its programs on disk, and a count.

Steps are compiled before the first request. Anything compiled later is a defect that `num_compiles` makes visible.
"""

from __future__ import annotations

from pathlib import Path

import jax


def enable_compile_cache(cache_dir: Path) -> None:
    """Keeps compiled programs under `cache_dir`, unless the user has already chosen a place."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]  # made at import
        jax.config.update("jax_compilation_cache_dir", str(cache_dir / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


class _Counter:
    def __init__(self) -> None:
        self.num_compiles = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("/backend_compile_duration"):
            self.num_compiles += 1


_counter = _Counter()


def num_compiles() -> int:
    """Programs this process has compiled or loaded from the persistent cache so far."""
    return _counter.num_compiles
