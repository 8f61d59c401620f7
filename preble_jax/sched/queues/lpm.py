"""Longest prefix match: the request with most cached tokens goes first, then by arrival (SGLang, arXiv 2312.07104).

Most hits, no promise: a request that shares nothing waits as long as others that do keep coming.
"""

from __future__ import annotations

from collections.abc import Iterator

from preble_jax.sched.queues.base import CachedTokens
from preble_jax.sched.queues.by_match import RankedByMatch, match_key
from preble_jax.sched.queues.ordered import Ordered
from preble_jax.sched.sequence import Sequence


class LPM(RankedByMatch):
    def __init__(self) -> None:
        super().__init__()
        self._ranked: Ordered[int, Sequence] = Ordered()

    def _place(self, sequence: Sequence, cached: int) -> None:
        self._ranked.insert(match_key(sequence, cached), sequence)

    def _displace(self, sequence: Sequence, cached: int) -> None:
        self._ranked.pop(match_key(sequence, cached))

    def candidates(self, cached_tokens: CachedTokens) -> Iterator[Sequence]:
        self._rank_unsure(cached_tokens)
        key: int | None = None
        while (key := self._ranked.after(key)) is not None:
            yield self._ranked[key]
