"""What the policies that rank by cached prefix share: each waiting sequence's cached tokens, as last heard."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator

from preble_jax.sched.queues.base import CachedTokens, QueuePolicy
from preble_jax.sched.sequence import Sequence

MAX_RANKED_PER_STEP = 128
"""Sequences that are ranked anew in one step, the longest unsure first. A sequence costs about 7 us."""

_ORDER_BITS = 40


def match_key(sequence: Sequence, cached: int) -> int:
    """An integer that sorts by longest match, then by arrival: as (-cached, order) does, but compared faster."""
    return (-cached << _ORDER_BITS) + sequence.order


class RankedByMatch(QueuePolicy):
    """Keeps every waiting sequence in the place that its cached tokens give it.

    A new one is placed as if nothing of it were cached and is *unsure*, as is one whose pages came or went. The next
    steps ask for the cached tokens of unsure ones, at most MAX_RANKED_PER_STEP each; until then they keep their place.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, Sequence] = {}  # by order
        self._cached: dict[int, int] = {}  # order -> cached tokens, as its place says
        self._unsure: OrderedDict[int, Sequence] = OrderedDict()

    @abstractmethod
    def _place(self, sequence: Sequence, cached: int) -> None:
        """Puts it where `cached` tokens belong."""

    @abstractmethod
    def _displace(self, sequence: Sequence, cached: int) -> None:
        """Takes it away from there."""

    def add(self, sequence: Sequence) -> None:
        self._waiting[sequence.order] = sequence
        self._cached[sequence.order] = 0
        self._place(sequence, 0)
        self._unsure[sequence.order] = sequence

    def remove(self, sequence: Sequence) -> None:
        if self._waiting.get(sequence.order) is not sequence:
            raise KeyError(f"request {sequence.request.request_id!r} is not waiting")
        del self._waiting[sequence.order]
        self._displace(sequence, self._cached.pop(sequence.order))
        self._unsure.pop(sequence.order, None)

    def rematched(self, sequence: Sequence) -> None:
        if sequence.order in self._waiting:
            self._unsure[sequence.order] = sequence

    def _rank_unsure(self, cached_tokens: CachedTokens) -> None:
        for _ in range(min(len(self._unsure), MAX_RANKED_PER_STEP)):
            order, sequence = self._unsure.popitem(last=False)
            cached = cached_tokens(sequence)
            if cached != self._cached[order]:
                self._displace(sequence, self._cached[order])
                self._cached[order] = cached
                self._place(sequence, cached)

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting.values())
