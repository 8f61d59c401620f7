"""What `preble-jax profile` measured, as a cost model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preble_jax.errors import ConfigError
from preble_jax.sched.step_costs import KeyCosts, StepCosts
from preble_jax.sim.cost import StepWork, find_cost, scheduler_costs
from preble_jax.sim.cost.profiled import ProfiledCost

KEYS = {"prefill_base_s": 0.5, "prefill_token_s": 0.25, "decode_token_s": 0.125}
STEPS = StepCosts(
    decode_s=((8, 1.0), (16, 2.0)),
    mixed_s=((64, 4.0), (256, 8.0)),
    keys=KeyCosts(key_s=0.001, shared_key_s=0.01),
    min_sharers=3,
)
ENGINE = {"prefill_tokens": 256, "max_prefill_seqs": 4, "max_num_seqs": 16, "kv_tokens": 4096}


def write(path: Path, **content: object) -> str:
    path.write_text(json.dumps({**KEYS, "step_costs": STEPS.to_json(), "engine": ENGINE, **content}))
    return str(path)


def test_a_file_becomes_a_model(tmp_path: Path) -> None:
    cost = find_cost(write(tmp_path / "mine.json"))
    assert cost.name == "mine"
    assert cost.engine.kv_tokens == 4096
    assert cost.step_s(StepWork(2, 300, (), 300)) == pytest.approx(1.3)
    assert cost.step_s(StepWork(2, 300, ((65, 65),), 365)) == pytest.approx(8.3)


def test_sharing_is_told_from_the_distinct_tokens(tmp_path: Path) -> None:
    """Four sequences of 100 tokens with 60 in common hold 60 + 4 * 40 distinct ones."""
    cost = find_cost(write(tmp_path / "mine.json"))
    assert cost.step_s(StepWork(4, 400, (), 220)) == pytest.approx(1.0 + 60 * 0.01 + 160 * 0.001)
    assert cost.step_s(StepWork(2, 200, (), 140)) == pytest.approx(1.2), "too few for reading together"
    assert cost.step_s(StepWork(4, 400, (), 500)) == pytest.approx(1.4)
    assert cost.step_s(StepWork(4, 400, (), 4)) == pytest.approx(2.0), "all of it, and no more than that"


def test_more_than_was_measured_takes_more_in_proportion(tmp_path: Path) -> None:
    cost = find_cost(write(tmp_path / "mine.json"))
    assert cost.step_s(StepWork(32, 32, (), 32)) == pytest.approx(2 * 2.0 + 0.032)
    assert cost.step_s(StepWork(0, 0, ((768, 768),), 768)) == pytest.approx(3 * 8.0)


def test_chunks_are_computed_in_tiles(tmp_path: Path) -> None:
    tiled = StepCosts(decode_s=((8, 1.0),), mixed_s=((64, 4.0),), keys=KeyCosts(pair_s=0.001), tile=16)
    cost = find_cost(write(tmp_path / "mine.json", step_costs=tiled.to_json()))
    full = cost.step_s(StepWork(0, 0, ((16, 100),), 100))
    assert full == pytest.approx(4.0 + sum(range(85, 101)) / 1000)
    assert full < cost.step_s(StepWork(0, 0, ((1, 100),), 100)) == pytest.approx(4.0 + 16 * 100 / 1000)


def test_tokens_and_dispatches_have_their_price(tmp_path: Path) -> None:
    """Of a backend that does not compute padding; steps of one dispatch share what it costs."""
    costs = StepCosts(decode_s=((8, 1.0),), mixed_s=((64, 4.0),), keys=KeyCosts(token_s=0.5), dispatch_s=0.8)
    cost = find_cost(write(tmp_path / "mine.json", step_costs=costs.to_json()))
    assert cost.step_s(StepWork(2, 300, ((10, 10), (6, 6)), 300)) == pytest.approx(4.0 + 16 * 0.5)
    assert cost.step_s(StepWork(2, 300, (), 300)) == pytest.approx(1.8)
    assert cost.step_s(StepWork(2, 300, (), 300, num_steps=4)) == pytest.approx(1.2)


def test_what_was_measured_beside_neighbours_is_read(tmp_path: Path) -> None:
    beside = {"num_neighbours": 3, "crowded_step_costs": STEPS.scaled(2.0).to_json()}
    cost = ProfiledCost.read(Path(write(tmp_path / "mine.json", **beside)))
    assert cost.crowding is not None and cost.crowding.num_neighbours == 3
    assert cost.step_s(StepWork(2, 300, (), 300)) == pytest.approx(1.3)
    assert cost.crowding.cost.step_s(StepWork(2, 300, (), 300)) == pytest.approx(2.6)
    nobody = ProfiledCost.read(Path(write(tmp_path / "none.json", num_neighbours=0, crowded_step_costs=None)))
    assert nobody.crowding is None


def test_a_file_without_them_has_none(tmp_path: Path) -> None:
    old = STEPS.to_json()
    del old["dispatch_s"], old["keys"]["token_s"]
    cost = find_cost(write(tmp_path / "old.json", step_costs=old))
    assert cost.step_s(StepWork(2, 300, (), 300)) == pytest.approx(1.3)


def test_the_longest_sequence_may_be_given(tmp_path: Path) -> None:
    lockstep = StepCosts(decode_s=((8, 1.0),), mixed_s=((64, 4.0),), keys=KeyCosts(slot_key_s=0.001))
    cost = find_cost(write(tmp_path / "mine.json", step_costs=lockstep.to_json()))
    assert cost.step_s(StepWork(2, 300, (), 300)) == pytest.approx(1.0 + 8 * 0.150)
    assert cost.step_s(StepWork(2, 300, (), 300, longest_decode=250)) == pytest.approx(1.0 + 8 * 0.250)


def test_an_older_file_says_what_the_schedulers_know(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps(KEYS))
    cost = find_cost(str(tmp_path / "old.json"))
    assert cost.step_s(StepWork(0, 0, ((100, 500),), 500)) == pytest.approx(0.5 + 25)
    assert cost.step_s(StepWork(8, 800, (), 800)) == pytest.approx(0.5 + 8 * (0.125 - 0.5 / 8))
    told = scheduler_costs(cost)
    assert told.prefill_token_s == pytest.approx(0.25, rel=0.01)
    assert told.decode_token_s == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"engine": None}, "step_costs and engine"),
        ({"engine": {"kv_tokens": 1}}, "step_costs and engine"),
        ({"step_costs": {}}, "decode_s"),
        ({"step_costs": {**STEPS.to_json(), "decode_s": [[8, -1.0]]}}, "seconds > 0"),
        ({"step_costs": {**STEPS.to_json(), "mixed_s": [[64, 1.0], [8, 1.0]]}}, "increasing sizes"),
        ({"step_costs": {**STEPS.to_json(), "keys": {"key_s": float("nan")}}}, "seconds >= 0"),
        ({"step_costs": {**STEPS.to_json(), "keys": {"bees": 1}}}, "bees"),
        ({"step_costs": {**STEPS.to_json(), "tile": 0}}, "tile"),
        ({"num_neighbours": 1}, "crowded_step_costs"),
        ({"num_neighbours": 1, "crowded_step_costs": {}}, "decode_s"),
        ({"step_costs": None, "decode_token_s": "much"}, "decode_token_s"),
    ],
)
def test_a_damaged_file(tmp_path: Path, content: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        find_cost(write(tmp_path / "mine.json", **content))


@pytest.mark.parametrize("text", [None, "", "[]", "nonsense"])
def test_no_such_file(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ConfigError, match=r"preble-jax profile|prefill_base_s"):
        find_cost(str(tmp_path / "mine.json"))
