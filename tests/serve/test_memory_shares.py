"""Workers of one deployment take their parts of one machine's memory."""

from __future__ import annotations

from dataclasses import replace

from preble_jax.config import Config, KVSettings, ServeSettings
from serve.commands import _as_worker


def test_a_worker_knows_how_many_share_the_memory() -> None:
    config = Config(serve=ServeSettings(groups=3))
    assert _as_worker(config) == replace(config, kv=KVSettings(memory_sharers=3))


def test_what_was_configured_stays() -> None:
    config = Config(serve=ServeSettings(groups=3), kv=KVSettings(memory_sharers=1, num_pages=7))
    assert _as_worker(config) == config
