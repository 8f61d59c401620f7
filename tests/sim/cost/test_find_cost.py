"""Cost models by name, and what the schedulers are told of them."""

from __future__ import annotations

import pytest

from preble_jax.errors import ConfigError
from preble_jax.sim.cost import COSTS, StepWork, find_cost, scheduler_costs
from preble_jax.sim.cost.base import EngineShape, StepCost
from preble_jax.sim.cost.scheduling import prompt_s


@pytest.mark.parametrize("name", COSTS)
def test_every_model_can_be_used(name: str) -> None:
    cost = find_cost(name)
    engine = cost.engine
    assert cost.name == name
    assert min(engine.prefill_tokens, engine.max_prefill_seqs, engine.max_num_seqs) >= 1
    assert engine.kv_tokens >= 16_384
    rows = engine.max_num_seqs
    for work in (
        StepWork(1, 1, (), 1),
        StepWork(rows, 3000 * rows, (), 1000 * rows),
        StepWork(rows, 3000 * rows, ((engine.prefill_tokens, 4096),), 1000 * rows),
        StepWork(0, 0, ((1, 1),), 1),
    ):
        assert 0.0 < cost.step_s(work) < 20.0
        assert cost.step_s(work) == cost.step_s(work)


def test_the_published_models_are_there() -> None:
    assert {"mistral7b_a6000", "mistral7b_a100", "llama70b_tp2_a100", "llama70b_tp2_h100"} <= set(COSTS)
    assert {"llama8b_h200", "llama8b_v5e", "llama8b_v6e", "smollm2_cpu"} <= set(COSTS)
    assert all(find_cost(name).engine.kv_tokens == 198_516 for name in COSTS if "_a6000" in name or "_tp2_" in name)


def test_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"got 'mistral7b_a600'; the nearest is mistral7b_a6000"):
        find_cost("mistral7b_a600")


class Line:
    """Prompts cost 3 ms and 2 ms a token, however they are cut; rows 5 ms."""

    name = "line"
    engine = EngineShape(prefill_tokens=10_000, max_prefill_seqs=1, max_num_seqs=8, kv_tokens=1000)

    def step_s(self, work: StepWork) -> float:
        return 3e-3 + 2e-3 * work.num_extend + 5e-3 * work.num_decode


def test_schedulers_are_told_the_line() -> None:
    cost: StepCost = Line()
    told = scheduler_costs(cost)
    assert told.prefill_base_s == pytest.approx(3e-3)
    assert told.prefill_token_s == pytest.approx(2e-3)
    assert told.decode_token_s == pytest.approx((3e-3 + 8 * 5e-3) / 8)


@pytest.mark.parametrize("name", COSTS)
def test_schedulers_are_told_something_near(name: str) -> None:
    cost = find_cost(name)
    told = scheduler_costs(cost)
    for num_tokens in (256, 1024, 2048):
        assert told.prefill_ns(num_tokens) / 1e9 == pytest.approx(prompt_s(cost, num_tokens), rel=0.5)


def test_prompts_are_computed_in_chunks() -> None:
    cost = find_cost("mistral7b_a100")
    steps = [StepWork(0, 0, ((extend, length),), length) for extend, length in ((512, 512), (512, 1024), (76, 1100))]
    assert prompt_s(cost, 1100) == pytest.approx(sum(map(cost.step_s, steps)))
