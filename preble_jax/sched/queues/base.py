"""What a queue policy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq

from preble_jax.sched.sequence import Sequence

CachedTokens = Callable[[Sequence], int]
"""How many of a waiting sequence's tokens pages hold right now."""


class QueuePolicy(ABC):
    """Proposes an order; the local scheduler disposes (slots, pages and token budget are its business).

    No call may take time in proportion to the queue. What a policy remembers of cached prefixes is therefore brought up
    to date a bounded number of sequences at a time, and may lag; the scheduler asks the cache itself before it admits.
    The hooks that only a policy with tenants needs do nothing here.
    """

    # -- the queue ---------------------------------------------------------------------------------

    @abstractmethod
    def add(self, sequence: Sequence) -> None:
        """A new or a preempted request waits."""

    @abstractmethod
    def remove(self, sequence: Sequence) -> None:
        """It was admitted, cancelled, or failed. KeyError if it does not wait."""

    @abstractmethod
    def candidates(self, cached_tokens: CachedTokens) -> Iterator[Sequence]:
        """Waiting sequences, best first. The caller may stop at any time, and calls `admitted`, `remove` and `served`
        for those it takes before it asks for the next one. Not taking one means that it waits for a page which a
        running sequence is computing."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Sequence]: ...

    # -- what happens to its requests --------------------------------------------------------------

    def rematched(self, sequence: Sequence) -> None:
        """Pages of a waiting sequence's prompt came or went: `cached_tokens` may have another answer now."""
        return

    def admitted(self, sequence: Sequence) -> None:
        """The sequence just proposed starts to run."""
        return

    def served(self, sequence: Sequence, extend_tokens: int, output_tokens: int) -> None:
        """Service its tenant is charged with. At the first admission: the prompt tokens no page held, all at once.
        After a step: the output token it got. Nothing for computing again after a preemption. Negative extend tokens
        give back what will not be computed, because the request ended before its prompt did."""
        return

    def finished(self, sequence: Sequence) -> None:
        """It has ended and comes back no more, whether it ran or waited (then `remove` was called)."""
        return

    def victim(self, running: Seq[Sequence]) -> Sequence:
        """Who is preempted when pages run out; `running` is by arrival and not empty. Here: the latest arrival."""
        return running[-1]

    def deficits(self) -> Mapping[str, float]:
        """What each known tenant may still receive before others go first, in service units; negative: what it has had
        too much. Empty for a policy without tenants. O(tenants)."""
        return {}
