"""Runs are told apart by whatever differs but the seed, and by no more of it than is needed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from preble_jax.errors import InvalidRequestError
from preble_jax.sim.labels import Row, distinctions, labels, labels_of
from preble_jax.sim.panels import ablation_panels, rate_panels
from preble_jax.sim.scenario import Scenario, Source
from preble_jax.sim.settings import Fault, SimSettings

KNOWN = ("workload", "groups", "placement", "queue", "rate")
ONE = Scenario(source=Source(trace="traces/a/trace.jsonl", rate=5.0), sim=SimSettings(num_groups=2))


def _source(**changes: object) -> Scenario:
    return replace(ONE, source=replace(ONE.source, **changes))


def _sim(**changes: object) -> Scenario:
    return replace(ONE, sim=replace(ONE.sim, **changes))


OTHERS = {
    "trace=b/trace.jsonl": _source(trace="traces/b/trace.jsonl"),
    "length_scale=0.5": _source(length_scale=0.5),
    "num_requests=50": _source(num_requests=50),
    "cost=llama8b_h200": replace(ONE, cost="llama8b_h200"),
    "kv_tokens=4096": _sim(kv_tokens=4096),
    "sched.window_s=60": _sim(sched=replace(ONE.sim.sched, window_s=60.0)),
    "faults=kill:1@30 restart:1@60": _sim(
        faults=(Fault(at_s=30, group=1, kind="kill"), Fault(at_s=60.0, group=1, kind="restart"))
    ),
}


def _rows(*scenarios: Scenario) -> list[Row]:
    """Each with two seeds, which come to different latencies."""
    return [
        labels(scenario.with_seed(seed)) | {"summary": {"latency_mean_s": 10.0 * number + seed}}
        for number, scenario in enumerate(scenarios)
        for seed in (0, 1)
    ]


@pytest.mark.parametrize("text", OTHERS)
def test_whatever_differs_but_the_seed_is_said_and_drawn_apart(text: str) -> None:
    rows = _rows(ONE, OTHERS[text])
    name, _, value = text.partition("=")
    first, *_, last = distinctions(rows, KNOWN)
    assert (list(first), last) == ([name], {name: value})
    [panel] = rate_panels(rows, ["latency_mean_s"])
    assert [curve.y for curve in panel.curves] == [[0.5], [10.5]]
    assert text in panel.curves[1].label and text not in panel.curves[0].label
    [panel] = ablation_panels(rows, ["latency_mean_s"])
    assert [mean for mean, _ in panel.bars.values()] == [0.5, 10.5]


def test_what_the_known_labels_tell_is_not_said_again() -> None:
    others = [_source(trace="traces/a/other.jsonl"), _source(rate=6.0), _sim(num_groups=3), ONE.with_placement("e2")]
    assert not any(distinctions(_rows(ONE, *others), KNOWN))
    tuned = replace(ONE, cost="llama8b_h200", sim=replace(ONE.sim, kv_tokens=4096))
    assert list(distinctions(_rows(ONE, tuned), KNOWN)[0]) == ["cost"], "which tells the rest as well"


def test_rows_of_before_are_like_the_others() -> None:
    old, new = _rows(_sim(kv_tokens=4096))
    del old["settings"]
    assert distinctions([old, new], KNOWN) == [{}, {}]


def test_goodput_is_of_a_limit() -> None:
    rows = [{**row, "summary": {"slo": {"ttft": limit_s}}} for row, limit_s in zip(_rows(ONE), (1.0, 2.0), strict=True)]
    assert distinctions(rows, KNOWN) == [{"slo": "ttft=1"}, {"slo": "ttft=2"}]


def test_a_file_of_one_run_has_the_labels_of_its_row() -> None:
    for scenario in OTHERS.values():
        assert labels_of(json.loads(json.dumps(asdict(scenario)))) == labels(scenario)


@pytest.mark.parametrize("settings", [{}, {"source": {}, "sim": {}}, {"source": [], "sim": 1}])
def test_what_is_no_scenario(settings: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=r"settings: expected what .*; run the simulation again"):
        labels_of(settings)
