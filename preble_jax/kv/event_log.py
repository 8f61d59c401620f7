"""A group's KV events, numbered: what the global scheduler learns about this group's radix tree."""

from __future__ import annotations

from preble_jax.kv.events import BlocksStored, EventBatch, KVEvent, Snapshot
from preble_jax.kv.radix import RadixTree


class EventLog:
    """Collects events until they are taken. `generation` grows with each restart of the group."""

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self._first_seq = 0
        self._events: list[KVEvent] = []

    @property
    def next_seq(self) -> int:
        """The number the next event will have."""
        return self._first_seq + len(self._events)

    def append(self, event: KVEvent) -> None:
        self._events.append(event)

    def take(self) -> EventBatch | None:
        """All events since the last call, None if there were none."""
        if not self._events:
            return None
        batch = EventBatch(self.generation, self._first_seq, tuple(self._events))
        self._first_seq += len(self._events)
        self._events = []
        return batch

    def snapshot(self, tree: RadixTree) -> Snapshot:
        """The whole tree. Events not taken yet are part of it and are dropped."""
        self.take()
        stored = tuple([BlocksStored(tuple(hashes), parent) for hashes, parent in tree.chains()])
        return Snapshot(self.generation, self._first_seq, stored)
