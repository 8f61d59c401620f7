"""The global scheduler's speed and size: decisions in process (E2's and the default policy's) and over gRPC (the
default policy's), KV events, memory of the forest.

    python benchmarks/scheduler.py [--json OUT] [--rounds 5] [--only decisions rpc memory]

ToolBench-shaped traffic (toolbench.py). Each request is placed, its group's stores and evictions come back as KV
events, and it finishes. Prompts and hashes are made before the clock starts; only `place` is timed for the decisions,
only `kv_events` for the event pages. A row's value is the median of its rounds, its spread their least and greatest.
Everything runs on one core; over gRPC the client has a second one (place_rpc.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import forest_memory
import place_rpc
from rich import box
from rich.console import Console
from rich.table import Table
from toolbench import OUTPUT_TOKENS, PAGE_SIZE, FakeGroup, prompts

from preble_jax.bench.machine import processor
from preble_jax.config import SchedSettings
from preble_jax.kv.events import AllCleared
from preble_jax.sched import GlobalScheduler, PlaceRequest
from serve.scheduler import collect_rarely

ARRIVAL_GAP_S = 0.01
NUM_REQUESTS = 10_000
LARGE_FOREST_PAGES = 1_000_000
POLICIES = {"e2": "E2", "default": "default policy"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measure: median, least and greatest of its rounds. less: the target is an upper bound."""

    measure: str
    unit: str
    value: float
    least: float
    greatest: float
    target: float | None = None
    less: bool = False
    note: str = ""

    @classmethod
    def of(cls, measure: str, unit: str, samples: Sequence[float], target: float | None = None, **more: object) -> Row:
        value = statistics.median(samples)
        return cls(
            measure=measure, unit=unit, value=value, least=min(samples), greatest=max(samples), target=target, **more
        )  # type: ignore[arg-type]

    @property
    def met(self) -> bool:
        return self.target is None or (self.value <= self.target if self.less else self.value >= self.target)


class Traffic:
    """A scheduler, its groups, and how long its answers took."""

    def __init__(self, num_groups: int, placement: str) -> None:
        self.scheduler = GlobalScheduler(SchedSettings(placement=placement), PAGE_SIZE)  # type: ignore[arg-type]
        self.groups = {str(i): FakeGroup() for i in range(num_groups)}
        self._now = 0.0
        for name, group in self.groups.items():
            self.scheduler.add_group(name, group.num_pages, 1, 0.0)
        self.begin_round()

    def begin_round(self) -> None:
        self.spent: list[float] = []
        self.events_s, self.num_event_pages, self.num_explored = 0.0, 0, 0

    def run(self, requests: Sequence[PlaceRequest]) -> None:
        clock, scheduler = time.perf_counter, self.scheduler
        for request in requests:
            self._now += ARRIVAL_GAP_S
            start = clock()
            placement = scheduler.place(request, self._now)
            self.spent.append(clock() - start)
            batch = self.groups[placement.group].serve(request.block_hashes)
            pages = sum(len(event.hashes) for event in batch.events if not isinstance(event, AllCleared))
            start = clock()
            scheduler.kv_events(placement.group, batch, self._now)
            self.events_s += clock() - start
            self.num_event_pages += pages
            scheduler.finished(request.request_id, OUTPUT_TOKENS, placement.matched_tokens, self._now)
            self.num_explored += placement.decision == "explore"

    @property
    def decisions_per_s(self) -> float:
        return len(self.spent) / sum(self.spent)

    @property
    def p99_ms(self) -> float:
        return sorted(self.spent)[int(0.99 * len(self.spent))] * 1e3

    @property
    def event_pages_per_s(self) -> float:
        return self.num_event_pages / self.events_s


def decision_rows(num_rounds: int) -> Iterator[Row]:
    requests = list(prompts(NUM_REQUESTS))
    event_rates: list[float] = []
    for placement, name in POLICIES.items():
        for num_groups, target in ((4, 20_000), (64, 15_000)):
            rates, p99s = [], []
            for _ in range(num_rounds):
                traffic = Traffic(num_groups, placement)
                traffic.run(requests)
                rates.append(traffic.decisions_per_s)
                p99s.append(traffic.p99_ms)
                event_rates.append(traffic.event_pages_per_s)
            # The targets of few groups are E2's.
            yield Row.of(f"{name} decisions, {num_groups} groups", "/s", rates, target if name == "E2" else None)
            yield Row.of(f"{name} decisions, {num_groups} groups, p99", "ms", p99s)
        yield from large_rows(num_rounds, placement)
    yield Row.of("KV events applied", "pages/s", event_rates, 500_000)


def large_rows(num_rounds: int, placement: str) -> Iterator[Row]:
    """Rounds on one scheduler, whose forest has its million pages before the first."""
    traffic = Traffic(1_024, placement)
    numbers = prompts(200_000)
    while traffic.scheduler.num_blocks < LARGE_FOREST_PAGES:
        traffic.run(list(islice(numbers, 2_000)))
    num_pages = traffic.scheduler.num_blocks
    rates, p99s = [], []
    for _ in range(num_rounds):
        traffic.begin_round()
        traffic.run(list(islice(numbers, NUM_REQUESTS)))
        rates.append(traffic.decisions_per_s)
        p99s.append(traffic.p99_ms)
    held = f"{num_pages / 1e6:.2f} to {traffic.scheduler.num_blocks / 1e6:.2f} M pages"
    name = f"{POLICIES[placement]} decisions, 1,024 groups"
    yield Row.of(name, "/s", rates, 8_000, note=held)
    yield Row.of(f"{name}, p99", "ms", p99s, 1.0, less=True, note=held)


def rpc_rows(num_rounds: int) -> Iterator[Row]:
    for way, name, num_requests, target in (
        (place_rpc.unary, "Place over gRPC, unary", 5_000, 5_000),
        (place_rpc.batched, "Place over gRPC, batches of 64 on a stream", 10_000, 20_000),
        (place_rpc.coalesced, "Place and Finished, coalesced by a frontend", 10_000, None),
    ):
        rates, cpu_us = asyncio.run(place_rpc.rounds(way, num_rounds, num_requests))
        yield Row.of(name, "/s", rates, target, note=f"{cpu_us:.0f} us of the scheduler's CPU each")


def memory_rows(num_rounds: int) -> Iterator[Row]:
    """One process a sample. What another group costs a page: from the same pages on few groups and on many."""
    few, many = 4, 1_024
    by_groups = {
        num: [forest_memory.measure(num, LARGE_FOREST_PAGES) for _ in range(min(num_rounds, 3))] for num in (few, many)
    }
    sizes = {num: [sample["bytes_a_page"] for sample in samples] for num, samples in by_groups.items()}
    for num, samples in by_groups.items():
        note = f"{samples[0]['pages']:,.0f} pages, each on {samples[0]['held_pages'] / samples[0]['pages']:.2f} groups"
        name = f"forest, per cached page, {num:,} groups"
        yield Row.of(name, "bytes", sizes[num], 200 + num / 8, less=True, note=note)
    bits = [8 * (b - a) / (many - few) for a, b in zip(sizes[few], sizes[many], strict=True)]
    yield Row.of("forest, per cached page and group", "bits", bits, 1.0, less=True)


def table(rows: Sequence[Row]) -> Table:
    found = Table(box=box.SIMPLE_HEAD)
    for column in ("measure", "value", "spread", "target", ""):
        found.add_column(column, justify="left" if column in ("measure", "") else "right")
    for row in rows:
        sign = "<=" if row.less else ">="
        target = "" if row.target is None else f"{sign} {_number(row.target)}{'' if row.met else ' (not met)'}"
        spread = f"{_number(row.least)} .. {_number(row.greatest)}"
        found.add_row(row.measure, f"{_number(row.value)} {row.unit}", spread, target, row.note)
    return found


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--rounds", type=int, default=5)
    parts = {"decisions": decision_rows, "rpc": rpc_rows, "memory": memory_rows}
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    collect_rarely()
    rows: list[Row] = []
    for part in arguments.only:
        os.sched_setaffinity(0, cores if part == "rpc" else cores[-1:])
        rows += parts[part](arguments.rounds)
    console = Console(width=150)
    console.print(table(rows))
    if arguments.json is not None:
        machine = {"machine": f"{platform.machine()}, {processor()}", "cores": len(cores), "rounds": arguments.rounds}
        machine["python"] = platform.python_version()
        document = {**machine, "rows": [{**asdict(row), "met": row.met} for row in rows]}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    for name in POLICIES.values():
        rates = [f"{row.value:,.0f}" for row in rows if row.unit == "/s" and row.measure.startswith(name)]
        if rates:
            print(f"{name} decisions/s at 4, 64 and 1,024 groups: {' '.join(rates)}")


if __name__ == "__main__":
    main()
