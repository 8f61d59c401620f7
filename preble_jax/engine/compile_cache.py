"""Compilation: caches with which the second start finds its programs and kernels on disk, and a count.

Steps are compiled before the first request. Anything compiled later is a defect that `num_compiles` makes visible.
"""

from __future__ import annotations

import threading
from pathlib import Path

import jax

from kernels_pallas.cpu.usable import keep_code_in


def enable_compile_cache(cache_dir: Path) -> None:
    """Keeps compiled programs under `cache_dir`, unless the user has already chosen a place."""
    if cache_folder() is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    keep_code_in(cache_dir / "cpu_kernels")


class _Counter:
    """Several threads compile, hence the lock."""

    def __init__(self) -> None:
        self.num_compiles = 0
        self.num_from_cache = 0
        self._lock = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        jax.monitoring.register_event_listener(self._hear_event)

    def _hear(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("/backend_compile_duration"):
            with self._lock:
                self.num_compiles += 1

    def _hear_event(self, event: str, **_: str | int) -> None:
        if event.endswith("/compilation_cache/cache_hits"):
            with self._lock:
                self.num_from_cache += 1


_counter = _Counter()


def num_compiles() -> int:
    """Programs this process has compiled or loaded from the persistent cache so far."""
    return _counter.num_compiles


def num_from_cache() -> int:
    """Those of `num_compiles` that the persistent cache had."""
    return _counter.num_from_cache


def cache_folder() -> str | None:
    """Where compiled programs are kept; None while the persistent cache is off."""
    folder: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # made at import
    return folder
