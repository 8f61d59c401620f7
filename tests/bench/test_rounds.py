"""What a round says it saw, against an engine whose requests are known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble_jax.bench.rounds import Result, _latencies, measure, percentile
from preble_jax.bench.workloads import Shape, Workload, make_workload
from preble_jax.engine.engine import Engine
from preble_jax.errors import InvalidRequestError, PromptTooLongError
from preble_jax.progress import NullProgress

# 24 tokens are three pages: each family's first prompt computes them, the others find them.
SHAPE = Shape(num_families=2, num_prefix=24, num_requests=10, num_own=9, num_output=6)


@pytest.fixture(scope="module")
def result(engine: Engine) -> Result:
    workload = make_workload("mine", SHAPE, 3, vocab_size=256)
    (result,) = measure(engine, [workload], 2, NullProgress())
    return result


def test_tokens_and_hits_are_counted(result: Result) -> None:
    for seen in result.rounds:
        assert (seen.num_requests, seen.prompt_tokens, seen.output_tokens) == (10, 10 * 33, 10 * 6)
        assert seen.cached_tokens == 8 * 24, "every round begins with an empty cache"
        assert seen.computed_tokens == 10 * 33 - 8 * 24
        assert seen.hit_ratio == pytest.approx(8 * 24 / 330)


def test_rates_are_of_the_rounds_seconds(result: Result) -> None:
    for seen in result.rounds:
        assert seen.requests_per_s * seen.seconds == pytest.approx(10)
        assert seen.prompt_tokens_per_s * seen.seconds == pytest.approx(330)
        assert seen.output_tokens_per_s * seen.seconds == pytest.approx(60)
        assert 0 < seen.ttft_p50_s <= seen.ttft_p90_s < seen.seconds
        assert 0 < seen.inter_token_p50_s <= seen.inter_token_p90_s < seen.seconds


def test_the_split_fits_into_the_round(result: Result) -> None:
    for seen in result.rounds:
        parts = seen.plan_s + seen.arrays_s + seen.dispatch_s + seen.settle_s
        assert seen.host_s == pytest.approx(parts)
        assert 0 < seen.host_s < seen.seconds
        assert 0 < seen.device_s < seen.seconds
        assert 0 < seen.num_dispatches <= seen.num_steps


def test_nothing_compiles_and_nothing_is_left(result: Result, engine: Engine) -> None:
    assert [seen.num_compiles for seen in result.rounds] == [0, 0]
    assert not engine.has_work
    engine.scheduler.validate()


def test_json_has_every_round_and_the_medians(result: Result) -> None:
    document = result.to_json()
    assert (document["name"], document["seed"], document["max_tokens"]) == ("mine", 3, 6)
    assert len(document["rounds"]) == 2
    seconds = [seen.seconds for seen in result.rounds]
    assert document["median"]["seconds"] == pytest.approx(sum(seconds) / 2)
    assert document["median"]["output_tokens"] == 60
    assert result.seconds_range == (min(seconds), max(seconds))


def test_a_bad_prompt_is_named_and_nothing_runs(engine: Engine) -> None:
    steps = engine.ledger.steps
    good = Workload(name="good", seed=0, max_tokens=2, prompts=[[1, 2]])
    long = Workload(name="long", seed=0, max_tokens=2, prompts=[[1], [1] * 5000])
    with pytest.raises(PromptTooLongError, match=r"workload long, prompt 1: .* got 5000"):
        measure(engine, [good, long], 1, NullProgress())
    foreign = Workload(name="foreign", seed=0, max_tokens=2, prompts=[[999]])
    with pytest.raises(InvalidRequestError, match=r"workload foreign, prompt 0: .*\[0, 255\], got 999"):
        measure(engine, [foreign], 1, NullProgress())
    assert engine.ledger.steps == steps


def test_an_interrupted_round_leaves_nothing_behind(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = engine.step, iter(range(2))

    def interrupted():
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(engine, [make_workload("mine", SHAPE, 3, vocab_size=256)], 1, NullProgress())
    monkeypatch.undo()
    while engine.has_work:
        engine.step()
    engine.scheduler.validate()


def test_tokens_that_arrive_together_share_the_wait() -> None:
    seen = _latencies([[(1.0, 1), (1.8, 4), (2.0, 1)], [(3.0, 1)], []])
    assert (seen["ttft_p50_s"], seen["ttft_p90_s"]) == (1.0, 3.0)
    assert seen["inter_token_p50_s"] == pytest.approx(0.2)
    assert seen["inter_token_p90_s"] == pytest.approx(0.2)
    assert (seen["arrival_gap_p50_s"], seen["arrival_gap_p90_s"]) == (pytest.approx(0.2), pytest.approx(0.8))


@given(st.lists(st.floats(0, 1e3), min_size=1), st.integers(1, 99))
def test_percentiles(values: list[float], q: int) -> None:
    value = percentile(values, q)
    assert value in values
    assert 100 * sum(v <= value for v in values) >= q * len(values)
    assert 100 * sum(v < value for v in values) < q * len(values)
    assert percentile([], q) == 0.0
