"""Grids and capacities: rows in order, nothing run twice, a file that can be continued, equal results in processes."""

from __future__ import annotations

import json
import math
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from preble_jax.errors import InvalidRequestError
from preble_jax.sim.capacity import estimate_rate, find_capacities, lasts, predict
from preble_jax.sim.labels import Row, labels
from preble_jax.sim.rate_search import MOST_RATE, rate_at
from preble_jax.sim.scenario import Scenario, Source
from preble_jax.sim.settings import SimSettings
from preble_jax.sim.slo import Target
from preble_jax.sim.sweep import Job, RowFile, Workers, make_workers, read_rows, run_grid, run_job

TARGET = Target.parse("ttft_p99=5")
SCENARIO = Scenario(
    source=Source(workload="toolbench", rate=8.0, num_requests=30),
    sim=SimSettings(num_groups=2),
    cost="mistral7b_a6000",
)


def with_placement(placement: str, seed: int = 0) -> Scenario:
    return SCENARIO.with_placement(placement).with_seed(seed)


class FakeWorkers(Workers):
    """Answers at once: a probe passes up to the capacity that is written down for (placement, seed)."""

    def __init__(self, capacities: dict[tuple[str, int], float], num_requests: int = 1000) -> None:
        super().__init__(1)
        self.summary = {"hit_ratio": 0.5, "requests": num_requests}
        self.capacities = capacities
        self.probed: list[tuple[str, int, float]] = []

    def start(self, job: Job) -> Future[Row]:
        label = labels(job.scenario)
        self.probed.append((label["placement"], label["seed"], label["rate"]))
        capacity = self.capacities[label["placement"], label["seed"]]
        met = label["rate"] <= capacity
        value_s = TARGET.limit_s * (label["rate"] / capacity) ** 4 if met else None
        done: Future[Row] = Future()
        probed = {"target": str(job.target), "met": met, "value_s": value_s, "summary": self.summary}
        done.set_result({"key": job.key, **label, **probed})
        return done


def capacities(workers: Workers, file: RowFile, scenarios: list[Scenario], tolerance: float = 0.03) -> list[Row]:
    jobs = [Job(scenario=scenario, target=TARGET) for scenario in scenarios]
    return find_capacities(jobs, tolerance=tolerance, workers=workers, file=file)


def test_a_grid_keeps_its_order_and_is_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    jobs = [Job(scenario=with_placement(name, seed)) for name in ("e2", "round_robin") for seed in (0, 1)]
    with make_workers(1) as workers:
        rows = run_grid(jobs, workers, RowFile(path))
    assert [(row["placement"], row["seed"]) for row in rows] == [(n, s) for n in ("e2", "round_robin") for s in (0, 1)]
    assert all(row["summary"]["requests"] == 30 for row in rows)
    written = {row["key"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert [written[row["key"]] for row in rows] == rows

    class Refuse(Workers):
        def start(self, job: Job) -> Future[Row]:
            raise AssertionError("run again")

    assert run_grid(jobs, Refuse(1), RowFile(path)) == rows


def test_other_processes_come_to_the_same(tmp_path: Path) -> None:
    jobs = [Job(scenario=with_placement("e2", seed)) for seed in (0, 1)]
    with make_workers(2) as workers:
        rows = run_grid(jobs, workers, RowFile(None))
    real = ("wall_s", "place_s", "requests_per_wall_s")
    for row, job in zip(rows, jobs, strict=True):
        expected = run_job(job)
        for key in real:
            del row["summary"][key], expected["summary"][key]
        assert row == expected


def test_a_line_that_was_cut_off_is_run_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"key": "a", "x": 1}\n{"key": "b", "x')
    assert list(RowFile(path).rows) == ["a"]
    file = RowFile(path)
    file.add({"key": "c"})
    assert [row["key"] for row in read_rows(path)] == ["a", "c"]


@pytest.mark.parametrize("text", ['{"key": "a"}\nnot JSON\n{"key": "b"}\n', '{"no": "key"}\n', "[1]\n"])
def test_another_file_is_not_written_into(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidRequestError, match=r"rows.jsonl:\d: expected a line of"):
        RowFile(path)
    assert path.read_text() == text


def test_what_is_no_text_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0")
    for path in (tmp_path, tmp_path / "binary"):
        with pytest.raises(InvalidRequestError, match="cannot read it"):
            RowFile(path)
    assert (tmp_path / "binary").read_bytes() == b"\xff\xfe\0"


def test_a_probe_gives_up_early() -> None:
    probe = run_job(Job(scenario=SCENARIO.with_rate(1e4), target=Target.parse("latency_p99=0.2")))
    assert (probe["met"], probe["value_s"], probe["summary"]["stopped"]) == (False, None, True)
    assert probe["summary"]["finished"] < 30
    probe = run_job(Job(scenario=SCENARIO.with_rate(0.5), target=Target.parse("latency_p99=60")))
    assert probe["met"] and 0.0 < probe["value_s"] < 60.0 and probe["summary"]["finished"] == 30


def test_capacities_with_few_probes() -> None:
    """Seeds shift all policies alike: after the first policy's, each search begins at its end."""
    shifts = {0: 1.0, 1: 1.2, 2: 0.9, 3: 1.05}
    truth = {(name, s): base * x for name, base in (("e2", 20.0), ("lmetric", 26.0)) for s, x in shifts.items()}
    workers = FakeWorkers(truth)
    scenarios = [with_placement(name, seed) for name, seed in truth]
    file = RowFile(None)
    rows = capacities(workers, file, scenarios)
    for row in rows:
        assert row["capacity"] <= truth[row["placement"], row["seed"]] < 1.0301 * row["capacity"]
        assert row["summary"] == workers.summary
        assert lasts(row) == pytest.approx(1000 / row["capacity"] / 5.0)
    assert sum(row["probes"] for row in rows) == len(workers.probed) == len(set(workers.probed)), "nothing twice"
    late = [row["probes"] for row in rows if row["placement"] == "lmetric" and row["seed"] > 0]
    assert max(late) <= 3, "two where the prediction is right"

    again = FakeWorkers({})
    assert capacities(again, file, scenarios) == rows and again.probed == []


def test_a_search_goes_on_where_it_was_ended(tmp_path: Path) -> None:
    truth = {("e2", 0): 20.0, ("e2", 1): 30.0}
    scenarios = [with_placement("e2", seed) for seed in (0, 1)]
    whole = FakeWorkers(truth)
    rows = capacities(whole, RowFile(tmp_path / "whole.jsonl"), scenarios)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_text("".join(lines[:4]))
    rest = FakeWorkers(truth)
    assert [row["capacity"] for row in capacities(rest, RowFile(tmp_path / "part.jsonl"), scenarios)] == [
        row["capacity"] for row in rows
    ]
    assert len(rest.probed) < len(whole.probed)
    keys = [row["key"] for row in read_rows(tmp_path / "part.jsonl")]
    assert len(set(keys)) == len(keys), "no row is written twice"


def test_no_capacity_at_all_and_policies_with_one_beside_it() -> None:
    workers = FakeWorkers({("e2", 0): 0.0, ("e2", 1): 0.0, ("lmetric", 0): 5.0})
    scenarios = [with_placement("e2", 0), with_placement("e2", 1), with_placement("lmetric", 0)]
    rows = capacities(workers, RowFile(None), scenarios, tolerance=0.5)
    assert [row["capacity"] for row in rows[:2]] == [0.0, 0.0] and rows[0]["summary"] == {}
    assert 5.0 / 1.5 < rows[2]["capacity"] <= 5.0
    assert lasts(rows[0]) == math.inf


@pytest.mark.parametrize(("truth", "num_probes"), [(math.inf, 3), (2 * MOST_RATE, 3), (700.0, 12)])
def test_too_few_requests_to_overload_anything_are_found_out_at_once(truth: float, num_probes: int) -> None:
    """With what was found before, where they drain at a rate that can be found."""
    workers = FakeWorkers({("e2", 0): truth}, num_requests=30)
    (row,) = capacities(workers, RowFile(None), [with_placement("e2")])
    assert row["capacity"] == pytest.approx(min(truth, MOST_RATE), rel=0.03)
    assert lasts(row) < 0.01
    assert row["probes"] == len(workers.probed) == len(set(workers.probed)) <= num_probes


def test_a_real_capacity_is_where_it_passes_and_the_next_rate_fails() -> None:
    scenario = replace(SCENARIO, source=replace(SCENARIO.source, num_requests=60))
    target = Target.parse("ttft_p90=1")
    with make_workers(1) as workers:
        jobs = [Job(scenario=scenario, target=target)]
        (row,) = find_capacities(jobs, tolerance=0.2, workers=workers, file=RowFile(None))
    assert row["capacity"] > 0
    probes = [run_job(Job(scenario=scenario.with_rate(row["capacity"] * x), target=target)) for x in (1.0, 1.2)]
    assert [probe["met"] for probe in probes] == [True, False]
    assert 1 / 3 < estimate_rate(scenario) / row["capacity"] < 3


def test_predictions_add_a_chain_and_a_seed() -> None:
    assert predict({"e2": {0: 50}}, "lmetric", 0) == 50
    assert predict({"e2": {0: 50, 1: 54}}, "lmetric", 1) == 54
    assert predict({"e2": {0: 50, 1: 54}, "lmetric": {0: 60}}, "lmetric", 1) == 64
    assert predict({"e2": {0: 50}, "lmetric": {0: 60, 1: 62}}, "lmetric", 2) == 61


def test_the_grid_is_common() -> None:
    """Equal probes of different searches have equal keys, whatever rate the scenario was written with."""
    step = Job(scenario=SCENARIO.with_rate(rate_at(70, 0.03)), target=TARGET)
    assert step.key == Job(scenario=SCENARIO.with_rate(1.0).with_rate(rate_at(70, 0.03)), target=TARGET).key
    assert step.key != replace(step, target=None).key
    assert step.key != Job(scenario=step.scenario.with_seed(1), target=TARGET).key
