"""Where the scheduler stands in one group's stream of KV events."""

from __future__ import annotations


class EventCursor:
    """Numbers of one generation: what was applied, what is known to exist, when a snapshot was last asked for.

    `behind` says that events are known to exist that were never applied; only a snapshot (or the missing events
    themselves) can help.
    """

    __slots__ = ("_asked_at", "_highest_seq", "generation", "next_seq")

    def __init__(self, generation: int) -> None:
        self.restart(generation)

    def restart(self, generation: int) -> None:
        self.generation = generation
        self.next_seq = 0
        self._highest_seq = 0
        self._asked_at: float | None = None

    @property
    def behind(self) -> bool:
        return self.next_seq < self._highest_seq

    def exists(self, next_seq: int) -> None:
        """The group has made events 0 .. next_seq - 1."""
        self._highest_seq = max(self._highest_seq, next_seq)

    def take(self, first_seq: int, num_events: int) -> int | None:
        """Moves past a batch. Returns how many of its events were applied before; None when there is a hole before it
        (then nothing of it may be applied)."""
        end = first_seq + num_events
        self.exists(end)
        if first_seq > self.next_seq:
            return None
        num_known = min(self.next_seq - first_seq, num_events)
        self.next_seq = max(self.next_seq, end)
        return num_known

    def jump(self, next_seq: int) -> bool:
        """Moves to a snapshot's place. False when the snapshot is older than what was applied."""
        if next_seq < self.next_seq:
            return False
        self.next_seq = next_seq
        self.exists(next_seq)
        self._asked_at = None
        return True

    def ask(self, now: float, retry_s: float) -> bool:
        """Whether to ask for a snapshot now; notes that it was asked for."""
        if self._asked_at is not None and now - self._asked_at < retry_s:
            return False
        self._asked_at = now
        return True
