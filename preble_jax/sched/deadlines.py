"""Which requests' deadlines have passed, without looking at the others."""

from __future__ import annotations

import heapq

from preble_jax.sched.sequence import Sequence


class Deadlines:
    """A heap by deadline. A request that ends before its deadline is dropped from the heap some time later."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []  # (deadline_s, order)
        self._live: dict[int, Sequence] = {}  # by order

    def add(self, sequence: Sequence) -> None:
        """Does nothing if it has no deadline."""
        deadline_s = sequence.request.deadline_s
        if deadline_s is None:
            return
        self._live[sequence.order] = sequence
        heapq.heappush(self._heap, (deadline_s, sequence.order))

    def remove(self, sequence: Sequence) -> None:
        """It has ended."""
        self._live.pop(sequence.order, None)
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = [entry for entry in self._heap if entry[1] in self._live]
            heapq.heapify(self._heap)

    def take_passed(self, now: float) -> list[Sequence]:
        """Those whose deadline is `now` or earlier, earliest first, each once."""
        passed = []
        while self._heap and self._heap[0][0] <= now:
            sequence = self._live.pop(heapq.heappop(self._heap)[1], None)
            if sequence is not None:
                passed.append(sequence)
        return passed
