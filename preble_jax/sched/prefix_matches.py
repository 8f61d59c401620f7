"""How many pages of each waiting prompt are cached, kept up to date by the pages that come and go.

A match of n pages changes in two ways only: page n + 1 of the prompt is stored, or page n is evicted (leaves go first,
parents come first). So a sequence watches these two block hashes; a page that nobody watches costs a look-up, and a
page that a thousand sequences watch makes their matches stale at once, in constant time. What is stale is matched
again, by binary search over its chain of hashes, when it is asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from preble_jax.errors import InvariantError
from preble_jax.kv.prefix_cache import PrefixCache
from preble_jax.sched.sequence import Sequence


class _Watchers:
    """Sequences, by order, that watch `block_hash`. stale: it has come or gone since."""

    __slots__ = ("block_hash", "sequences", "stale")

    def __init__(self, block_hash: bytes) -> None:
        self.block_hash = block_hash
        self.sequences: dict[int, Sequence] = {}
        self.stale = False


class _Match:
    __slots__ = ("num_pages", "watched")

    def __init__(self, num_pages: int, watched: tuple[_Watchers, ...]) -> None:
        self.num_pages = num_pages
        self.watched = watched

    @property
    def stale(self) -> bool:
        for watchers in self.watched:  # noqa: SIM110 - any() takes three times as long, ten thousand times
            if watchers.stale:
                return True
        return False


class PrefixMatches:
    """Of one device group's waiting sequences. Listens to the cache's tree from construction on."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._matches: dict[int, _Match] = {}  # by order
        self._watchers: dict[bytes, _Watchers] = {}
        self._stale: deque[_Watchers] = deque()
        cache.tree.on_change = self._changed

    def num_pages(self, sequence: Sequence) -> int:
        """Leading pages of `sequence` that are cached now, not counting the one with its last token. Exact."""
        match = self._matches.get(sequence.order)
        if match is None or match.stale:
            match = self._match(sequence)
        return match.num_pages

    def take_stale(self, limit: int) -> list[Sequence]:
        """At most `limit` sequences whose match has changed and was not asked for since."""
        taken: list[Sequence] = []
        while self._stale and len(taken) < limit:
            watchers = self._stale[0]
            if watchers.sequences:
                taken.append(watchers.sequences.popitem()[1])
            else:
                self._stale.popleft()
        return taken

    def forget(self, sequence: Sequence) -> None:
        """It does not wait any more."""
        match = self._matches.pop(sequence.order, None)
        if match is None:
            return
        for watchers in match.watched:
            watchers.sequences.pop(sequence.order, None)
            if not watchers.sequences and not watchers.stale:
                del self._watchers[watchers.block_hash]

    def _match(self, sequence: Sequence) -> _Match:
        self.forget(sequence)
        hashes = sequence.matchable_hashes()
        num_pages = self._cache.match(hashes)
        watched = tuple(self._watch(h, sequence) for h in hashes[max(num_pages - 1, 0) : num_pages + 1])
        match = self._matches[sequence.order] = _Match(num_pages, watched)
        return match

    def _watch(self, block_hash: bytes, sequence: Sequence) -> _Watchers:
        watchers = self._watchers.get(block_hash)
        if watchers is None:
            watchers = self._watchers[block_hash] = _Watchers(block_hash)
        watchers.sequences[sequence.order] = sequence
        return watchers

    def _changed(self, hashes: Iterable[bytes]) -> None:
        if not self._watchers or self._watchers.keys().isdisjoint(hashes):
            return
        for block_hash in hashes:
            watchers = self._watchers.pop(block_hash, None)
            if watchers is not None:
                watchers.stale = True
                self._stale.append(watchers)

    def validate(self) -> None:
        """Raises InvariantError if a remembered match is not what the cache says, or watchers leak. O(waiting)."""
        watching: set[bytes] = set()
        for order, match in self._matches.items():
            for watchers in match.watched:
                sequence = watchers.sequences.get(order)
                if watchers.stale or match.stale or sequence is None:
                    continue
                watching.add(watchers.block_hash)
                found = self._cache.match(sequence.matchable_hashes())
                if found != match.num_pages:
                    raise InvariantError(
                        f"match of sequence {order}: {match.num_pages} pages remembered, {found} found"
                    )
        leaked = {h for h, watchers in self._watchers.items() if not watchers.sequences}
        if leaked or not watching <= self._watchers.keys():
            raise InvariantError(f"prefix matches: {len(leaked)} hashes are watched by nobody, expected 0")
