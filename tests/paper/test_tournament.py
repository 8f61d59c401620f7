"""The tournament's table and totals, on rows made up."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.paper.tournament import DEFAULT, E2, POLICIES, Case, at_once_jobs, at_once_rows, capacity_rows, totals
from preble_jax.sim.rate_search import MOST_RATE
from preble_jax.sim.scenario import Source
from preble_jax.sim.slo import Target

CHOSEN = [each for each in POLICIES if each.name in (DEFAULT, E2, "lmetric")]
# Capacities by case, policy and seed; every run has 1000 requests and a limit of 5 s: 200 requests/s last for it once.
TRUTH: dict[str, dict[str, list[float]]] = {
    "steady": {DEFAULT: [30.0, 50.0], E2: [20.0, 20.0], "lmetric": [24.0, 26.0]},
    "brief": {DEFAULT: [400.0, 400.0], E2: [160.0, 240.0 - 1.0], "lmetric": [1000.0, 1000.0]},
    "rivals_burst": {DEFAULT: [50.0, 50.0], E2: [50.0, 50.0], "lmetric": [400.0, 400.0]},
    "endless": {DEFAULT: [MOST_RATE, MOST_RATE], E2: [100.0, 100.0], "lmetric": [300.0, 300.0]},
    "hopeless": {DEFAULT: [10.0, 10.0], E2: [0.0, 0.0], "lmetric": [20.0, 20.0]},
}


@pytest.fixture(scope="module")
def table() -> list[dict[str, Any]]:
    cases = [
        Case(name=name, source=Source(workload="chat", rate=1.0), target=Target.parse("ttft_p99=5")) for name in TRUTH
    ]
    rows = [
        {
            "workload": case,
            "placement": placement,
            "seed": seed,
            "capacity": capacity,
            "target": "ttft_p99=5",
            "summary": {"requests": 1000} if capacity else {},
        }
        for case, policies in TRUTH.items()
        for placement, capacities in policies.items()
        for seed, capacity in enumerate(capacities)
    ]
    return capacity_rows(rows, cases, CHOSEN)


def of(table: list[dict[str, Any]], case: str, placement: str) -> dict[str, Any]:
    (row,) = [row for row in table if (row["workload"], row["placement"]) == (case, placement)]
    return row


def test_a_row_a_case_and_policy(table: list[dict[str, Any]]) -> None:
    assert len(table) == len(TRUTH) * len(CHOSEN)
    mine = of(table, "steady", DEFAULT)
    assert mine["capacity"] == [40.0, pytest.approx(127.06)], "t of 12.706 times 10"
    assert (mine["over_e2"][0], mine["over_best_baseline"][0], mine["best_baseline"]) == (2.0, 1.6, "lmetric")
    assert of(table, "steady", E2)["best_baseline"] == "lmetric"
    assert of(table, "endless", E2)["capacity"] is None is of(table, "endless", E2)["over_best_baseline"]
    assert of(table, "hopeless", DEFAULT)["over_e2"] is None


def test_how_long_the_requests_last_and_what_is_a_burst(table: list[dict[str, Any]]) -> None:
    assert of(table, "steady", DEFAULT)["lasts"] == pytest.approx((1000 / 30 / 5 + 1000 / 50 / 5) / 2, rel=1e-4)
    assert of(table, "brief", DEFAULT)["lasts"] == 0.5
    assert of(table, "brief", E2)["lasts"] > 1.0
    assert of(table, "hopeless", E2)["lasts"] is None
    assert all("lasts" in row for row in table)
    bursts = {row["workload"]: row["burst"] for row in table}
    assert bursts == {"steady": False, "brief": True, "rivals_burst": False, "endless": True, "hopeless": False}
    assert all(row["burst"] == bursts[row["workload"]] for row in table)


def test_totals_leave_bursts_out_and_say_what_they_are_with_them(table: list[dict[str, Any]]) -> None:
    mine, other, _ = totals(table, CHOSEN)
    assert (mine["placement"], other["placement"]) == (DEFAULT, E2)
    assert mine["over_e2"] == pytest.approx(2.0**0.5, rel=1e-4), "steady and rivals_burst"
    assert mine["over_e2_with_bursts"] == pytest.approx((2.0 * 400 / 199.5) ** (1 / 3), rel=1e-4)
    assert (mine["worst_workload"], mine["worst_over_best_baseline"][0]) == ("rivals_burst", 0.125)
    assert other["worst_workload"] == "hopeless" == other["worst_workload_with_bursts"]
    alone = [row for row in table if row["workload"] in ("steady", "brief")]
    (mine, *_) = totals(alone, CHOSEN)
    assert (mine["worst_workload"], mine["worst_workload_with_bursts"]) == ("steady", "brief")
    assert (mine["worst_over_best_baseline"][0], mine["worst_over_best_baseline_with_bursts"][0]) == (1.6, 0.4)
    (none, *_) = totals([row for row in table if row["burst"]], CHOSEN)
    assert (none["over_e2"], none["worst_over_best_baseline"], none["worst_workload"]) == (None, None, None)


def test_cases_without_a_capacity_are_measured_all_at_once(table: list[dict[str, Any]]) -> None:
    cases = [
        Case(name=name, source=Source(workload="chat", rate=1.0), target=Target.parse("ttft_p99=5")) for name in TRUTH
    ]
    jobs = at_once_jobs(table, cases, CHOSEN, 2)
    assert len(jobs) == len({job.key for job in jobs}) == 2 * len(CHOSEN), "of the endless one"
    assert {job.target for job in jobs} == {None} and {job.scenario.source.rate for job in jobs} == {MOST_RATE}
    served = {
        DEFAULT: [(30.0, 2.0), (50.0, 2.0)],
        E2: [(20.0, 3.0), (20.0, 1.0)],
        "lmetric": [(24.0, 1.0), (26.0, 2.0)],
    }
    rows = [
        {
            "workload": "endless",
            "placement": placement,
            "seed": seed,
            "summary": {"requests": 9, "throughput_per_s": rate, "ttft_p99_s": late_s, "ttft_mean_s": late_s / 2},
        }
        for placement, seeds in served.items()
        for seed, (rate, late_s) in enumerate(seeds)
    ]
    mine, e2, _ = at_once_rows(rows, CHOSEN)
    assert (mine["placement"], mine["requests"], mine["throughput_per_s"]["mean"][0]) == (DEFAULT, 9, 40.0)
    assert mine["throughput_per_s"]["over_e2"][0] == 2.0 and mine["throughput_per_s"]["over_best_baseline"][0] == 1.6
    late = mine["ttft_p99_s"]
    assert (late["mean"], late["over_e2"][0], late["best_baseline"]) == ([2.0, 0.0], 1.0, "lmetric"), "less is better"
    assert late["over_best_baseline"] == [0.75, pytest.approx(0.25 * 12.706, rel=1e-3)], "1 / 2 and 2 / 2"
    assert e2["ttft_mean_s"]["over_best_baseline"] == [0.75, pytest.approx(5 / 6 * 12.706, rel=1e-3)]
