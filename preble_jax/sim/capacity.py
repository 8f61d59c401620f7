"""SLO capacity: the highest rate at which a target is met, for many scenarios at once, with few simulated requests.

Scenarios that differ in the seed alone form a chain, chains that differ in the policies alone form a cell. One chain
of a cell goes before the others, and one search of each chain; from then on a search begins where the chain's other
seeds ended, corrected by what the seed made of the cell's other chains (a seed stands for a workload, whatever the
policy). So most searches begin a step or two from their end, and a probe that fails is given up as soon as too many
have missed.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

from preble_jax.config import QueueSettings, SchedSettings
from preble_jax.progress import NullProgress, Progress, Task
from preble_jax.sim.cost import find_cost
from preble_jax.sim.cost.base import StepWork
from preble_jax.sim.labels import Row, labels
from preble_jax.sim.rate_search import rate_at, search_steps, step_at
from preble_jax.sim.scenario import Scenario
from preble_jax.sim.slo import Target
from preble_jax.sim.sweep import Job, RowFile, Workers

# Steps of the grid by which the beginning of a search may be off: after an estimate from the workload's lengths, after
# another policy's capacity, after another seed's.
_STRIDE_ESTIMATE = 4
_STRIDE_RIVAL = 2
_STRIDE_SEED = 1
_SAMPLE = 1_000


@dataclass(kw_only=True)
class _Search:
    """job: the scenario at a rate that does not matter, and the target. step: being probed."""

    job: Job
    steps: Generator[int, float, int | None]
    step: int
    num_probes: int = 0


class CapacityFinder:
    """Drives the searches of `find_capacities`. Everything it learns goes to `file`, and what is there is not run."""

    def __init__(self, tolerance: float, workers: Workers, file: RowFile) -> None:
        self._tolerance = tolerance
        self._workers = workers
        self._file = file
        self._running: dict[Future[Row], _Search] = {}
        # Who begins when the search of that chain and seed has ended, or the first of that chain.
        self._waiting: dict[str, list[Job]] = {}
        self._open: set[str] = set()  # chains and seeds that are to be searched or being searched
        self._begun: set[str] = set()  # chains
        self._leads: dict[str, str] = {}  # the chain of each cell that goes before the others
        # Steps of the capacities that are known: cell, chain, seed.
        self._known: dict[str, dict[str, dict[int, int]]] = {}

    def run(self, jobs: Sequence[Job], task: Task) -> list[Row]:
        """A row a job, in their order."""
        jobs = [_without_rate(job) for job in jobs]
        missing: list[Job] = []
        for job in {job.key: job for job in jobs}.values():
            row = self._file.rows.get(self._key(job))
            if row is None:
                missing.append(job)
            else:
                self._learn(job, row["capacity"])
                task.advance()
        self._open = {_place(_chain(job), job) for job in missing}
        for job in missing:
            self._begin_or_wait(job, task)
        while self._running:
            done, _ = wait(self._running, return_when=FIRST_COMPLETED)
            for future in done:
                self._advance(self._running.pop(future), future.result(), task)
        return [self._file.rows[self._key(job)] | _labels(job) for job in jobs]

    def _begin_or_wait(self, job: Job, task: Task) -> None:
        """The first search of a chain goes before its others, and each seed of the cell's lead before the others'."""
        chain, cell = _chain(job), _cell(job)
        lead = self._leads.setdefault(cell, chain)
        chains = self._known.get(cell, {})
        if chain != lead and _place(lead, job) in self._open:
            self._waiting.setdefault(_place(lead, job), []).append(job)
        elif chain in self._begun and chain not in chains:
            self._waiting.setdefault(chain, []).append(job)
        elif chains:
            stride = _STRIDE_SEED if chain in chains else _STRIDE_RIVAL
            self._begin(job, predict(chains, chain, job.scenario.sim.seed), stride, task)
        else:
            self._begin(job, self._estimate(job), _STRIDE_ESTIMATE, task)

    def _begin(self, job: Job, start: int, stride: int, task: Task) -> None:
        self._begun.add(_chain(job))
        steps = search_steps(start, stride, self._tolerance, partial(self._over_early, job))
        self._probe(_Search(job=job, steps=steps, step=next(steps)), task)

    def _probe(self, search: _Search, task: Task) -> None:
        job = self._at(search.job, search.step)
        row = self._file.rows.get(job.key)
        if row is None:
            self._running[self._workers.start(job)] = search
        else:
            self._advance(search, row, task)

    def _advance(self, search: _Search, row: Row, task: Task) -> None:
        if row["key"] not in self._file.rows:
            self._file.add(row)
        search.num_probes += 1
        target = search.job.target
        assert target is not None
        try:
            search.step = search.steps.send(row["value_s"] / target.limit_s if row["met"] else math.inf)
        except StopIteration as done:
            self._finish(search, done.value, task)
        else:
            self._probe(search, task)

    def _finish(self, search: _Search, step: int | None, task: Task) -> None:
        row = self._row(search, step)
        self._file.add(row)
        task.advance()
        self._learn(search.job, row["capacity"])
        chain = _chain(search.job)
        self._open.discard(_place(chain, search.job))
        for group in (chain, _place(chain, search.job)):
            for other in self._waiting.pop(group, []):
                self._begin_or_wait(other, task)

    def _learn(self, job: Job, capacity: float) -> None:
        """Where nothing passes, the others look for themselves."""
        step = step_at(capacity, self._tolerance) if capacity else self._estimate(job)
        self._leads.setdefault(_cell(job), _chain(job))
        self._known.setdefault(_cell(job), {}).setdefault(_chain(job), {})[job.scenario.sim.seed] = step

    def _estimate(self, job: Job) -> int:
        return step_at(estimate_rate(job.scenario), self._tolerance)

    def _over_early(self, job: Job, step: int) -> bool:
        """step: one that passed."""
        assert job.target is not None
        num_requests = self._file.rows[self._at(job, step).key]["summary"]["requests"]
        return bool(num_requests < rate_at(step, self._tolerance) * job.target.limit_s)

    def _at(self, job: Job, step: int) -> Job:
        return replace(job, scenario=job.scenario.with_rate(rate_at(step, self._tolerance)))

    def _key(self, job: Job) -> str:
        return f"capacity-{self._tolerance:g}-{job.key}"

    def _row(self, search: _Search, step: int | None) -> Row:
        """capacity: requests a second, 0 where nothing passes. summary: of the run at that rate."""
        job = search.job
        row: dict[str, Any] = {
            "key": self._key(job),
            **_labels(job),
            "target": str(job.target),
            "tolerance": self._tolerance,
            "capacity": 0.0,
            "probes": search.num_probes,
            "summary": {},
        }
        if step is not None:
            row["capacity"] = rate_at(step, self._tolerance)
            row["summary"] = self._file.rows[self._at(job, step).key]["summary"]
        return row


def find_capacities(
    jobs: Sequence[Job], *, tolerance: float, workers: Workers, file: RowFile, progress: Progress | None = None
) -> list[Row]:
    """A row a job, in their order; the rate that its scenario has does not matter.

    jobs: each with a target. tolerance: the next higher rate, which fails, is so much higher, relatively.
    """
    assert all(job.target is not None for job in jobs)
    with (progress or NullProgress()).task("finding capacities", total=len(jobs)) as task:
        return CapacityFinder(tolerance, workers, file).run(jobs, task)


def lasts(row: Row) -> float:
    """Seconds in which the requests arrive at the rate of a row of `find_capacities`, over the target's limit. Below 1
    they have all come before the first of them can be late: that rate says how fast a burst drains, and nothing of what
    can be sustained. Infinite where nothing passes."""
    if not row["capacity"]:
        return math.inf
    return float(row["summary"]["requests"] / (row["capacity"] * Target.parse(row["target"]).limit_s))


def predict(chains: Mapping[str, Mapping[int, int]], chain: str, seed: int) -> int:
    """Where a search is expected to end, from a cell's known capacities ({chain: {seed: step}}, not empty): capacities
    are taken to be a chain's part plus a seed's part."""
    own = chains.get(chain)
    others = [known for name, known in chains.items() if name != chain]
    if not own:
        same_seed = [known[seed] for known in others if seed in known]
        return round(fmean(same_seed or [step for known in others for step in known.values()]))
    guesses = []
    for other_seed, step in own.items():
        shifts = [known[seed] - known[other_seed] for known in others if seed in known and other_seed in known]
        guesses.append(step + (fmean(shifts) if shifts else 0.0))
    return round(fmean(guesses))


def estimate_rate(scenario: Scenario) -> float:
    """Requests a second that keep the groups busy, from mean lengths and the share of prompts that nobody sent before:
    where a search begins. May be off by a factor of two; it costs nothing."""
    sim = scenario.sim
    sample = replace(scenario, source=replace(scenario.source, num_requests=_SAMPLE, duration_s=None))
    workload = sample.with_rate(float(sim.num_groups)).source.load(sim.num_groups, sim.seed)
    blocks = [block for request in workload.requests for block in request.blocks]
    num = len(workload.requests)
    shared_tokens = (len(blocks) - len(set(blocks))) * workload.block_size
    extend = max(workload.num_prompt_tokens - shared_tokens, num) / num
    output = sum(request.num_output for request in workload.requests) / num
    context = round(workload.num_prompt_tokens / num)
    cost = find_cost(scenario.cost)
    engine = sim.engine(cost.engine)
    rows = max(1, min(engine.max_num_seqs, engine.kv_tokens // max(context, 1)) // 2)
    chunk = engine.prefill_tokens
    prefill_s = cost.step_s(StepWork(0, 0, ((chunk, max(chunk, context)),), context)) / chunk
    decode_s = cost.step_s(StepWork(rows, rows * context, (), rows * context)) / rows
    return sim.num_groups / (extend * prefill_s + output * decode_s)


def _labels(job: Job) -> Row:
    return labels(job.scenario) | {"rate": None}


def _without_rate(job: Job) -> Job:
    return replace(job, scenario=job.scenario.with_rate(1.0))


def _chain(job: Job) -> str:
    return replace(job, scenario=job.scenario.with_seed(0)).key


def _place(chain: str, job: Job) -> str:
    """The search of the job's seed in that chain."""
    return f"{chain}-{job.scenario.sim.seed}"


def _cell(job: Job) -> str:
    scenario = job.scenario.with_seed(0)
    sim = replace(scenario.sim, sched=SchedSettings(), queue=QueueSettings())
    return f"cell-{replace(job, scenario=replace(scenario, sim=sim)).key}"
