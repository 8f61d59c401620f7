"""Decisions per second of the global scheduler, in process, on ToolBench-shaped prompts.

600 tokens shared by all, 960 per tool (Zipf 1.3 over 2,000 tools), 275 of the request's own; pages of 16 tokens. Each
request is placed, its group's stores and evictions come back as KV events, and it finishes. Prompts and hashes are made
before the clock starts; only `place` is timed for the decisions, only `kv_events` for the event pages.

    python benchmarks/scheduler.py [--requests 10000] [--groups 4 64]
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections import OrderedDict

from preble_jax.config import SchedSettings
from preble_jax.kv.events import AllCleared, BlocksRemoved, BlocksStored, EventBatch, KVEvent
from preble_jax.sched import GlobalScheduler, PlaceRequest

PAGE_SIZE, SHARED, TOOL, OWN, NUM_TOOLS, ZIPF = 16, 600, 960, 275, 2_000, 1.3
NUM_TOKENS = SHARED + TOOL + OWN


def prompts(num_requests: int, seed: int = 0) -> list[PlaceRequest]:
    """Hashes are numbers that name the prefix: what hashing costs is the frontend's business."""
    random_ = random.Random(seed)
    weights = list(itertools.accumulate(rank**-ZIPF for rank in range(1, NUM_TOOLS + 1)))
    requests = []
    for i, tool in enumerate(random_.choices(range(NUM_TOOLS), cum_weights=weights, k=num_requests)):
        hashes = []
        for page in range(NUM_TOKENS // PAGE_SIZE):
            end = (page + 1) * PAGE_SIZE
            owner = 0 if end <= SHARED else 1 + tool if end <= SHARED + TOOL else 1 + NUM_TOOLS + i
            hashes.append((owner << 32 | page).to_bytes(16, "little"))
        requests.append(
            PlaceRequest(request_id=str(i), block_hashes=tuple(hashes), num_tokens=NUM_TOKENS, max_tokens=64)
        )
    return requests


class FakeGroup:
    """A device group's tree as far as its KV events show it: stores what is new, evicts the least recently used."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.next_seq = 0
        self.pages: OrderedDict[bytes, None] = OrderedDict()

    def serve(self, hashes: tuple[bytes, ...]) -> EventBatch:
        num_cached = next((i for i, block in enumerate(hashes) if block not in self.pages), len(hashes))
        for block in reversed(hashes):
            self.pages[block] = None
            self.pages.move_to_end(block)
        events: list[KVEvent] = []
        if num_cached < len(hashes):
            events.append(BlocksStored(hashes[num_cached:], hashes[num_cached - 1] if num_cached else None))
        if len(self.pages) > self.num_pages:
            excess = len(self.pages) - self.num_pages
            events.append(BlocksRemoved(tuple(self.pages.popitem(last=False)[0] for _ in range(excess))))
        batch = EventBatch(1, self.next_seq, tuple(events))
        self.next_seq += len(events)
        return batch


def run(requests: list[PlaceRequest], num_groups: int) -> tuple[float, float, float, int]:
    """(decisions/s, 99th percentile of a decision in microseconds, KV event pages/s, explore decisions)."""
    scheduler = GlobalScheduler(SchedSettings(), PAGE_SIZE)
    groups = {str(i): FakeGroup(198_516 // PAGE_SIZE) for i in range(num_groups)}
    for name, group in groups.items():
        scheduler.add_group(name, group.num_pages, 1, 0.0)
    spent, events_s, num_event_pages, num_explored = [], 0.0, 0, 0
    for i, request in enumerate(requests):
        now = i * 0.01
        start = time.perf_counter()
        placement = scheduler.place(request, now)
        spent.append(time.perf_counter() - start)
        batch = groups[placement.group].serve(request.block_hashes)
        num_event_pages += sum(len(event.hashes) for event in batch.events if not isinstance(event, AllCleared))
        start = time.perf_counter()
        scheduler.kv_events(placement.group, batch, now)
        events_s += time.perf_counter() - start
        scheduler.finished(request.request_id, 43, placement.matched_tokens, now)
        num_explored += placement.decision == "explore"
    spent.sort()
    return len(spent) / sum(spent), spent[int(0.99 * len(spent))] * 1e6, num_event_pages / events_s, num_explored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 64])
    arguments = parser.parse_args()
    requests = prompts(arguments.requests)
    for num_groups in arguments.groups:
        rate, p99_us, pages, explored = run(requests, num_groups)
        print(
            f"{num_groups:5} groups: {rate:8,.0f} decisions/s, p99 {p99_us:5,.0f} us ({explored} explored), "
            f"{pages:9,.0f} event pages/s"
        )


if __name__ == "__main__":
    main()
