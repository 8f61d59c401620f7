"""Many simulations at once: grids, and the SLO capacity of each, on all cores, into a file that can be continued."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from preble_jax.errors import ConfigError, InvalidRequestError
from preble_jax.progress import NullProgress, Progress
from preble_jax.sim.labels import Row, labels
from preble_jax.sim.scenario import Scenario
from preble_jax.sim.slo import Slo, Target, TargetWatch
from preble_jax.sim.summary import summarize

_NO_SLO = Slo()


@dataclass(frozen=True, kw_only=True)
class Job:
    """target: the run is a probe of it and ends as soon as it is missed; None: an ordinary run."""

    scenario: Scenario
    slo: Slo = _NO_SLO
    target: Target | None = None

    @property
    def key(self) -> str:
        """Equal for jobs that come to the same, in every process and on every day."""
        text = json.dumps(asdict(self), sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def run_job(job: Job) -> Row:
    """A row of the sweep's file. One that stopped early says so in its summary: its times are of a part."""
    scenario = job.scenario
    workload = scenario.source.load(scenario.sim.num_groups, scenario.sim.seed)
    if job.target is None:
        scenario.source.require_requests(workload)
    watch = None if job.target is None else TargetWatch(job.target, len(workload.requests))
    result = scenario.run(workload, stop=watch)
    summary = summarize(result, scenario.sim.tenants, job.slo) | {"length_scale": workload.length_scale}
    row = {"key": job.key, **labels(scenario), "summary": summary}
    if job.target is None:
        return row
    summary = {name: value for name, value in summary.items() if name not in ("groups", "tenants")}
    value_s = job.target.value(result.requests)
    row |= {
        "target": str(job.target),
        "met": value_s <= job.target.limit_s,
        "value_s": None if math.isinf(value_s) else value_s,
        "summary": summary,
    }
    return row


class RowFile:
    """A row a line, appended as it comes: a sweep that was interrupted goes on where it was.

    path: None keeps the rows in memory only. Raises InvalidRequestError for a file that is not one of these,
    ConfigError for one that cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.rows: dict[str, Row] = {}
        if path is not None and path.exists():
            self.rows = {row["key"]: row for row in read_rows(path)}
            self._write("w", self.rows.values())

    def add(self, row: Row) -> None:
        self.rows[row["key"]] = row
        self._write("a", [row])

    def _write(self, mode: str, rows: Iterable[Row]) -> None:
        if self._path is None:
            return
        try:
            with self._path.open(mode, encoding="utf-8") as file:
                file.writelines(f"{json.dumps(row)}\n" for row in rows)
        except OSError as error:
            raise ConfigError(
                f"{self._path}: expected to write the sweep's rows, got {error.strerror or error}; make room and give"
                " the command again: it goes on after the rows that are there"
            ) from error


def read_rows(path: Path) -> list[Row]:
    """The rows of a sweep's file. A last line that was cut off in the middle is left out."""
    rows: list[Row] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise InvalidRequestError(
            f"{path}: expected a file of `preble-jax sim sweep`, cannot read it ({error}); name another file"
        ) from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line else None
        except ValueError:
            if number == len(lines):  # written when the process was ended
                break
            row = ()
        if row is None:
            continue
        if not isinstance(row, dict) or not isinstance(row.get("key"), str):
            raise InvalidRequestError(
                f"{path}:{number}: expected a line of `preble-jax sim sweep`, got {line[:60]!r}; name another file"
            )
        rows.append(row)
    return rows


class Workers:
    """Processes that run jobs. num_processes: 0: one a core; 1: in this process."""

    def __init__(self, num_processes: int = 0) -> None:
        self.num_processes = num_processes or len(os.sched_getaffinity(0))
        self._pool: ProcessPoolExecutor | None = None
        if self.num_processes > 1:
            # Not forked: the progress bar's thread may hold a lock at that moment.
            self._pool = ProcessPoolExecutor(self.num_processes, mp_context=get_context("spawn"))

    def start(self, job: Job) -> Future[Row]:
        if self._pool is not None:
            return self._pool.submit(run_job, job)
        done: Future[Row] = Future()
        done.set_result(run_job(job))
        return done

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


@contextmanager
def make_workers(num_processes: int = 0) -> Iterator[Workers]:
    workers = Workers(num_processes)
    try:
        yield workers
    finally:
        workers.close()


def run_grid(jobs: Sequence[Job], workers: Workers, file: RowFile, progress: Progress | None = None) -> list[Row]:
    """The rows of the jobs, in their order; those that the file has are not run again, and get the labels of today."""
    missing = {job.key: job for job in jobs if job.key not in file.rows}
    with (progress or NullProgress()).task("simulating", total=len(jobs)) as task:
        task.advance(len(jobs) - len(missing))
        for row in _in_any_order(missing.values(), workers):
            file.add(row)
            task.advance()
    return [file.rows[job.key] | labels(job.scenario) for job in jobs]


def _in_any_order(jobs: Iterable[Job], workers: Workers) -> Iterator[Row]:
    """As they are done; few are submitted ahead, so that an interruption loses little."""
    left = iter(jobs)
    running: set[Future[Row]] = set()
    while True:
        while len(running) < 2 * workers.num_processes and (job := next(left, None)) is not None:
            running.add(workers.start(job))
        if not running:
            return
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()
