"""The simulator beside the real cluster: what is told from the real runs, and how rows are put together."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from preble_jax.sim.cost import StepWork

PAPER = Path(__file__).parents[2] / "benchmarks" / "paper"
COST = Path(__file__).parents[2] / "preble_jax" / "sim" / "cost" / "data" / "smollm2_cpu.json"


@pytest.fixture
def validation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which finds what is beside it."""
    monkeypatch.syspath_prepend(str(PAPER))
    for name in ("validation", "truth_table", "real_cluster"):
        sys.modules.pop(name, None)
    return importlib.import_module("validation")


def test_pace_and_overhead_are_found_again(validation: ModuleType) -> None:
    """Of a "real" run that is a simulated one, on a machine 1.3 times as slow with 2 ms more a token."""
    cost = validation.ProfiledCost.read(COST)
    overrides = validation.overrides_of("round_robin", COST)
    real = validation.Overheads(slowness=1.3, token_s=0.002)
    workload = validation.calibration_requests()
    seconds = [
        validation.simulate(validation.replace(workload, requests=workload.requests[:num]), overrides, cost, real)[1]
        for num in (validation.NUM_FIRST, validation.NUM_WARM_UP, len(workload.requests))
    ]
    pace_s, step_s = seconds[1] - seconds[0], seconds[2] - seconds[1]
    assert validation.slowness(pace_s, COST, cost) == pytest.approx(1.3, rel=0.01)
    found = validation.overhead_s({"pace_s": pace_s, "step_s": step_s}, COST, cost)
    assert found == pytest.approx(0.002, rel=0.1)


def test_what_is_on_top_is_so_beside_neighbours_too(validation: ModuleType) -> None:
    work = StepWork(4, 400, (), 400)
    alone = validation.ProfiledCost.read(COST)
    crowding = validation.Crowding(alone, 1)
    cost = validation.ProfiledCost(name="a", engine=alone.engine, steps=alone.steps, crowding=crowding)
    changed = validation.Overheads(slowness=2.0, token_s=0.5).on_top_of(cost)
    expected = 2.0 * alone.step_s(work) + 4 * 0.5
    assert changed.step_s(work) == pytest.approx(expected)
    assert changed.crowding.cost.step_s(work) == pytest.approx(expected)


def test_means_over_seeds_are_compared(validation: ModuleType) -> None:
    def row(policy: str, seed: int, real: float, simulated: float) -> dict[str, object]:
        sides = {"real": real, "simulated": simulated}
        return {
            "policy": policy,
            "rate": 2.0,
            "seed": seed,
            "variant_latencies_s": [simulated - 0.1, simulated + 0.1],
            **{side: {"latency_mean_s": value, "hit_ratio": value / 10} for side, value in sides.items()},
        }

    rows = [row("a", 0, 1.0, 1.3), row("b", 0, 2.0, 1.0), row("a", 1, 3.0, 2.7), row("b", 1, 2.2, 1.0)]
    means = validation.over_seeds(rows)
    assert [(mean["policy"], mean["seeds"]) for mean in means] == [("a", [0, 1]), ("b", [0, 1])]
    assert means[0]["real"]["latency_mean_s"] == means[0]["simulated"]["latency_mean_s"] == pytest.approx(2.0)
    assert means[0]["variant_latencies_s"] == pytest.approx([1.9, 2.1])
    comparison = validation.compare(means)
    assert comparison["latency_misses"] == ["b at 2/s"]
    assert comparison["hit_ratio_misses"] == ["b at 2/s"]
    assert comparison["ranking_misses"] == [
        "a at 2/s to b: -4.8% real, +100.0% simulated, as in reality in 0 of 2 variants"
    ]
