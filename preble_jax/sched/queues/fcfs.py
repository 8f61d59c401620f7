"""First come, first served. A preempted request keeps its place by arrival."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from preble_jax.sched.queues.base import CachedTokens
from preble_jax.sched.sequence import Sequence


def _order(sequence: Sequence) -> int:
    return sequence.order


class FCFS:
    def __init__(self) -> None:
        self._waiting: list[Sequence] = []  # by arrival

    def add(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        index = bisect_left(self._waiting, sequence.order, key=_order)
        if index == len(self._waiting) or self._waiting[index] is not sequence:
            raise KeyError(f"request {sequence.request.request_id!r} is not waiting")
        del self._waiting[index]

    def candidates(self, cached_tokens: CachedTokens) -> Iterator[Sequence]:
        return iter(tuple(self._waiting))

    def admitted(self, sequence: Sequence) -> None:
        pass

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)
