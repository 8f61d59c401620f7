"""The file between `preble-jax profile` and the scheduler."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preble_jax.config_files import load_config
from preble_jax.cost_file import COSTS, read_costs, write_costs
from preble_jax.errors import ConfigError

VALUES = {"prefill_base_s": 0.5, "prefill_token_s": 0.25, "decode_token_s": 0.125}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_costs(tmp_path / "costs.json", {**VALUES, "machine": "a toaster"})
    assert read_costs(tmp_path / "costs.json") == VALUES


def test_a_deployment_takes_them(tmp_path: Path) -> None:
    write_costs(tmp_path / "costs.json", VALUES)
    overrides = {"sched.cost_file": str(tmp_path / "costs.json"), "sched.decode_token_s": "7"}
    settings = load_config(None, overrides).sched
    assert (settings.prefill_base_s, settings.prefill_token_s) == (0.5, 0.25)
    assert settings.decode_token_s == 7.0, "what the command line says counts more"


def test_the_shipped_measurement_can_be_loaded() -> None:
    [file] = (Path(__file__).resolve().parents[1] / "benchmarks" / "results").glob("step_costs_*.json")
    assert set(read_costs(file)) == set(COSTS)


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({**VALUES, "decode_token_s": -1}), '{"a": NaN}'])
def test_a_file_that_is_no_such_thing(tmp_path: Path, content: str) -> None:
    file = tmp_path / "costs.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"sched\.cost_file"):
        load_config(None, {"sched.cost_file": str(file)})


@pytest.mark.parametrize("value", [True, "0.1", None, float("nan"), float("inf")])
def test_a_cost_that_is_none(tmp_path: Path, value: object) -> None:
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({**VALUES, "prefill_base_s": value}))
    with pytest.raises(ConfigError, match="prefill_base_s"):
        read_costs(file)


def test_a_file_that_is_not_there_or_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="preble-jax profile"):
        read_costs(tmp_path / "missing.json")
    with pytest.raises(ConfigError, match="--output"):
        write_costs(tmp_path / "missing" / "costs.json", VALUES)
