"""What happens next, in simulated time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class EventQueue:
    """Calls by time; those of the same time in the order in which they were made known. now: time of the latest one."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, at_s: float, call: Callable[..., None], *args: Any) -> None:
        """`call(at_s, *args)` when it is time. A time that has passed is now."""
        self._num_pushed += 1
        heapq.heappush(self._heap, (at_s if at_s > self.now else self.now, self._num_pushed, call, args))

    @property
    def next_s(self) -> float | None:
        """Time of the next call; None when there is none."""
        return self._heap[0][0] if self._heap else None

    def step(self) -> None:
        """Makes the next call; there must be one."""
        at_s, _, call, args = heapq.heappop(self._heap)
        self.now = at_s
        call(at_s, *args)
