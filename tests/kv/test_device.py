"""How many pages an engine takes: as configured, or from what is free."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble_jax.config import KVSettings
from preble_jax.errors import ConfigError
from preble_jax.kv import device as kv_device
from preble_jax.kv.device import leading_bits, sized_layout

GIB = 1 << 30
# 30 layers of 3 heads of 64 in bfloat16: the default model's 23,040 bytes a token.
PAGE_BYTES = 16 * 23_040


def pages(settings: KVSettings, *, num_shards: int = 1, max_tokens: int = 0, device: Any = None) -> int:
    return sized_layout(
        settings,
        num_layers=30,
        num_kv_heads=3,
        head_dim=64,
        dtype=jnp.dtype(jnp.bfloat16),
        num_shards=num_shards,
        max_tokens=max_tokens,
        device=device,
    ).num_pages


def accelerator(limit: int, in_use: int) -> Any:
    stats = {"bytes_limit": limit, "bytes_in_use": in_use}
    return SimpleNamespace(platform="gpu", device_kind="An Accelerator", memory_stats=lambda: stats)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the machine says is free."""
    return lambda num_bytes: monkeypatch.setattr(kv_device, "free_host_bytes", lambda: num_bytes)


def test_explicit_settings_mean_what_they_say(free: Any) -> None:
    free(64 * GIB)
    assert pages(KVSettings(num_pages=77)) == 77
    assert pages(KVSettings(memory_gib=2.0)) == 2 * GIB // PAGE_BYTES
    assert pages(KVSettings(memory_gib=2.0), max_tokens=16) == 2 * GIB // PAGE_BYTES
    assert pages(KVSettings(memory_gib=2.0), num_shards=3) == 2 * GIB // (PAGE_BYTES // 3)


def test_the_cpu_gives_half_up_to_a_ceiling(free: Any) -> None:
    free(64 * GIB)
    assert pages(KVSettings()) == 2 * GIB // PAGE_BYTES
    free(2 * GIB)
    assert pages(KVSettings()) == GIB // PAGE_BYTES


def test_a_fraction_that_was_asked_for_knows_no_ceiling(free: Any) -> None:
    free(64 * GIB)
    assert pages(KVSettings(memory_fraction=0.5)) == 32 * GIB // PAGE_BYTES


def test_workers_of_one_machine_share_its_fraction(free: Any) -> None:
    """Whatever their order: each takes its part of what is left, and together they leave half."""
    left = 6 * GIB
    for _ in range(4):
        free(left)
        left -= pages(KVSettings(memory_sharers=4)) * PAGE_BYTES
    assert left >= 3 * GIB


@given(st.integers(1 << 28, 1 << 33))
def test_small_changes_of_free_memory_make_no_other_programs(num_bytes: int) -> None:
    sizes = {leading_bits(num, 2) for num in range(num_bytes, num_bytes + (num_bytes >> 3), num_bytes >> 6)}
    assert len(sizes) <= 2
    assert 0.66 * num_bytes < leading_bits(num_bytes, 2) <= num_bytes


def test_no_more_than_can_ever_be_used(free: Any) -> None:
    free(64 * GIB)
    assert pages(KVSettings(), max_tokens=4 * 1000) == 250


def test_an_accelerator_gives_nine_tenths_of_what_its_weights_left() -> None:
    got = pages(KVSettings(), device=accelerator(80 * GIB, 16 * GIB)) * PAGE_BYTES
    assert 0.88 * 64 * GIB < got <= 0.9 * 64 * GIB
    shared = pages(KVSettings(memory_sharers=4), device=accelerator(80 * GIB, 16 * GIB)) * PAGE_BYTES
    assert shared == got, "each worker has its own accelerators"


def test_too_little_is_said_clearly(free: Any) -> None:
    free(1 << 20)
    with pytest.raises(ConfigError, match=r"expected room for at least 2 pages of 368640 bytes, got 1 \(.*raise kv\."):
        pages(KVSettings())
    with pytest.raises(ConfigError, match=r"kv\.memory_gib=0"):
        pages(KVSettings(memory_gib=0.0))


def test_more_than_there_is(free: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"fit into what is free, 4\.00 GiB on An Accelerator, got 8\.00 GiB"):
        pages(KVSettings(memory_gib=8.0), device=accelerator(5 * GIB, GIB))
    free(GIB)
    with caplog.at_level(logging.WARNING):
        assert pages(KVSettings(memory_gib=8.0)) > 0
    assert "fit into what is free, 1.00 GiB" in caplog.text


def test_one_line_says_how_many_and_why(free: Any, caplog: pytest.LogCaptureFixture) -> None:
    free(3 * GIB)
    with caplog.at_level(logging.INFO):
        pages(KVSettings())
    assert "kv: 4369 pages of 16 tokens in 1.50 GiB (at most 50% of the 3.00 GiB that are free)" in caplog.text


def test_the_ceiling_is_named(free: Any, caplog: pytest.LogCaptureFixture) -> None:
    free(20 * GIB)
    with caplog.at_level(logging.INFO):
        pages(KVSettings())
    assert (
        "in 2.00 GiB (the most that is taken unasked; 50% of the 20.00 GiB that are free would be more)" in caplog.text
    )
