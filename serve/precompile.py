"""`preble-jax compile`: compiles every program of a deployment and keeps it, so that its starts only read them."""

from __future__ import annotations

import time

from rich.console import Console

from preble_jax.config import Config
from preble_jax.progress import make_progress


def run_compile(config: Config) -> int:
    """Does what a start does before it serves, so that it cannot compile anything else; says what was found."""
    start = time.monotonic()
    progress = make_progress()
    with progress.task("importing JAX"):
        from preble_jax.engine.compile_cache import cache_folder, num_compiles, num_from_cache
        from preble_jax.engine.engine import Engine

    engine = Engine.create(config, progress)
    compiled, found = num_compiles() - num_from_cache(), num_from_cache()
    Console().print(
        f"{config.model.name}: {compiled + found} programs, {compiled} of them compiled and {found} found, in "
        f"{time.monotonic() - start:.1f} s; {len(engine.runner.programs)} are step shapes; kept in {cache_folder()}",
        soft_wrap=True,
        highlight=False,
    )
    return 0
