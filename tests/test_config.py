"""Settings that cannot work are refused where they are made, by their dotted name."""

from __future__ import annotations

import pytest

from preble_jax.config import Config, TenantSettings
from preble_jax.config_files import load_config
from preble_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.max_model_len", "-1", "expected >= 0, got -1"),
        ("kv.page_size", "0", "expected >= 1, got 0"),
        ("kv.num_pages", "-5", "expected >= 0, got -5"),
        ("kv.memory_gib", "nan", "finite"),
        ("kv.memory_gib", "-1", "expected >= 0, got -1"),
        ("kv.memory_fraction", "1.5", r"expected in \[0.01, 0.99\], got 1.5"),
        ("kv.memory_sharers", "-1", "expected >= 0, got -1"),
        ("engine.max_num_seqs", "0", "expected >= 1, got 0"),
        ("engine.max_prefill_seqs", "0", "expected >= 1, got 0"),
        ("mesh.tensor", "0", "expected >= 1, got 0"),
        ("queue.num_priority_groups", "0", "expected >= 1, got 0"),
        ("queue.head_start", "-0.5", "expected >= 0, got -0.5"),
        ("queue.head_start", "inf", "finite"),
        ("queue.max_waiting", "0", "expected >= 1, got 0"),
        ("queue.dlpm_quantum", "0", "expected >= 1, got 0"),
        ("tenants.weights", "gold:0", "expected a number in .1e-6, 1e6. for 'gold', got 0.0"),
        ("tenants.weights", "gold:1,gold:2", "expected each tenant once"),
        ("tenants.extend_weight", "0", "expected a finite number > 0, got 0.0"),
        ("tenants.output_weight", "-1", "expected a finite number > 0, got -1.0"),
        ("serve.groups", "0", "expected >= 1, got 0"),
        ("serve.frontend_port", "70000", r"expected in \[0, 65535\], got 70000"),
        ("serve.report_interval_s", "0", "expected >= 0.01, got 0"),
        ("serve.start_timeout_s", "inf", "finite"),
        ("sched.window_s", "0", "expected finite seconds > 0"),
    ],
)
def test_values_out_of_range_name_the_key(key: str, value: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: .*{expected}"):
        load_config(None, {key: value})


def test_tenants_that_are_not_named_weigh_one() -> None:
    tenants = TenantSettings(weights=(("gold", 2.5),))
    assert (tenants.weight("gold"), tenants.weight("anybody")) == (2.5, 1.0)
    assert tenants.service(extend_tokens=10, output_tokens=3) == 16.0


def test_the_defaults_are_valid_and_equal() -> None:
    assert Config() == Config()
