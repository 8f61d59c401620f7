"""The scheduler benchmarks' traffic: ToolBench-shaped prompts, and device groups as far as their KV events show them.

600 tokens shared by all, 960 per tool (Zipf 1.3 over 2,000 tools), 275 of the request's own; pages of 16 tokens.
"""

from __future__ import annotations

import itertools
import random
from collections import OrderedDict
from collections.abc import Iterator

from preble_jax.kv.events import BlocksRemoved, BlocksStored, EventBatch, KVEvent
from preble_jax.sched import PlaceRequest

PAGE_SIZE, SHARED, TOOL, OWN, NUM_TOOLS, ZIPF = 16, 600, 960, 275, 2_000, 1.3
NUM_TOKENS = SHARED + TOOL + OWN
OUTPUT_TOKENS = 43
GROUP_PAGES = 198_516 // PAGE_SIZE  # the KV room of the paper's groups


def tools(num_requests: int, seed: int = 0) -> list[int]:
    """The tool of each request."""
    weights = list(itertools.accumulate(rank**-ZIPF for rank in range(1, NUM_TOOLS + 1)))
    return random.Random(seed).choices(range(NUM_TOOLS), cum_weights=weights, k=num_requests)


def chain(tool: int, request: int) -> tuple[bytes, ...]:
    """A prompt's block hashes: numbers that name the prefix, because what hashing costs is the frontend's business."""
    hashes = []
    for page in range(NUM_TOKENS // PAGE_SIZE):
        end = (page + 1) * PAGE_SIZE
        owner = 0 if end <= SHARED else 1 + tool if end <= SHARED + TOOL else 1 + NUM_TOOLS + request
        hashes.append((owner << 32 | page).to_bytes(16, "little"))
    return tuple(hashes)


def prompts(num_requests: int, first: int = 0, seed: int = 0) -> Iterator[PlaceRequest]:
    """Requests `first` and following: each number is another request, with a part of its own."""
    for number, tool in enumerate(tools(num_requests, seed + first), first):
        yield PlaceRequest(
            request_id=str(number), block_hashes=chain(tool, number), num_tokens=NUM_TOKENS, max_tokens=64
        )


class FakeGroup:
    """A device group's tree as far as its KV events show it: stores what is new, evicts the least recently used."""

    def __init__(self, num_pages: int = GROUP_PAGES) -> None:
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
