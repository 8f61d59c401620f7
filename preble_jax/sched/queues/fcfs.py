"""First come, first served. A preempted request keeps its place by arrival."""

from __future__ import annotations

from collections.abc import Iterator

from preble_jax.sched.queues.base import CachedTokens, QueuePolicy
from preble_jax.sched.queues.ordered import Ordered
from preble_jax.sched.sequence import Sequence


class FCFS(QueuePolicy):
    def __init__(self) -> None:
        self._waiting: Ordered[int, Sequence] = Ordered()  # by order

    def add(self, sequence: Sequence) -> None:
        self._waiting.insert(sequence.order, sequence)

    def remove(self, sequence: Sequence) -> None:
        if sequence.order not in self._waiting or self._waiting[sequence.order] is not sequence:
            raise KeyError(f"request {sequence.request.request_id!r} is not waiting")
        self._waiting.pop(sequence.order)

    def candidates(self, cached_tokens: CachedTokens) -> Iterator[Sequence]:
        order: int | None = None
        while (order := self._waiting.after(order)) is not None:
            yield self._waiting[order]

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)
