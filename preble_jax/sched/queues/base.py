"""What a queue policy is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from preble_jax.sched.sequence import Sequence

CachedTokens = Callable[[Sequence], int]
"""How many of a waiting sequence's tokens pages hold right now."""


class QueuePolicy(Protocol):
    """Proposes an order; the local scheduler disposes (slots, pages and token budget are its business)."""

    def add(self, sequence: Sequence) -> None:
        """A new or a preempted request waits."""

    def remove(self, sequence: Sequence) -> None:
        """It was admitted, cancelled, or failed."""

    def candidates(self, cached_tokens: CachedTokens) -> Iterator[Sequence]:
        """Waiting sequences, best first. The caller may stop at any time, and calls `admitted` (and `remove`) for
        those it takes before it asks for the next one."""

    def admitted(self, sequence: Sequence) -> None:
        """The sequence just proposed starts to run."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sequence]: ...
