"""How long requests of a prefix waited before their prefill began: on average over the window H, and over the window
before that, so that a change shows."""

from __future__ import annotations

from collections import OrderedDict, deque

from preble_jax.sched.placement.base import Prefix


class _Waits:
    """One prefix. Sums are integers, so they stay exact however long terms enter and leave."""

    __slots__ = ("before", "before_ns", "recent", "recent_ns")

    def __init__(self) -> None:
        self.recent: deque[tuple[float, int]] = deque()
        self.before: deque[tuple[float, int]] = deque()
        self.recent_ns = self.before_ns = 0

    def age(self) -> None:
        """The oldest recent one becomes one of the window before."""
        item = self.recent.popleft()
        self.before.append(item)
        self.recent_ns -= item[1]
        self.before_ns += item[1]

    def move(self, now: float, span_s: float) -> None:
        while self.recent and self.recent[0][0] + span_s <= now:
            self.age()
        while self.before and self.before[0][0] + 2 * span_s <= now:
            self.before_ns -= self.before.popleft()[1]


class QueueingTimes:
    """Times in nanoseconds, `now` and the window's span in seconds. Memory: the reports of two windows."""

    def __init__(self, span_s: float) -> None:
        self._span_s = span_s
        self._waits: OrderedDict[Prefix, _Waits] = OrderedDict()  # by the latest report
        self._changed: dict[Prefix, None] = {}

    def __len__(self) -> int:
        return len(self._waits)

    def add(self, prefix: Prefix, queue_ns: int, now: float) -> None:
        waits = self._waits.get(prefix)
        if waits is None:
            waits = self._waits[prefix] = _Waits()
        self._waits.move_to_end(prefix)
        waits.recent.append((now, queue_ns))
        waits.recent_ns += queue_ns
        self._changed[prefix] = None

    def averages(self, prefix: Prefix, now: float) -> tuple[float, float]:
        """(over the window, over the window before); 0 where nothing was reported."""
        waits = self._waits.get(prefix)
        if waits is None:
            return 0.0, 0.0
        waits.move(now, self._span_s)
        recent = waits.recent_ns / len(waits.recent) if waits.recent else 0.0
        return recent, waits.before_ns / len(waits.before) if waits.before else 0.0

    def restart(self, prefix: Prefix) -> None:
        """What was reported so far is what later reports are compared with."""
        waits = self._waits.get(prefix)
        while waits is not None and waits.recent:
            waits.age()

    def changed(self, now: float) -> list[Prefix]:
        """Prefixes with reports since the last call, in the order of their first one. Forgets those that are silent."""
        while self._waits:
            prefix, waits = next(iter(self._waits.items()))
            waits.move(now, self._span_s)
            if waits.recent or waits.before:
                break
            del self._waits[prefix]
        changed = list(self._changed)
        self._changed.clear()
        return changed
