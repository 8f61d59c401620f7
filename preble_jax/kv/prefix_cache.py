"""A device group's pages as requests see them: match, pin, extend, commit, release.

Who owns a page, and who frees it:

    state      from (inclusive)          until (exclusive)                   freed by
    free       start, `release`, evict   `extend`                            -
    private    `extend`                  `commit` or `release`               `release` (or `commit`, when another
                                                                             request committed the same page first)
    cached     `commit`                  evicted: leaf, unreferenced, LRU    `extend` of whoever needs room

Only the request that holds a private page writes to it; a cached page is never written again.
"""

from __future__ import annotations

from collections.abc import Sequence

from preble_jax.errors import InvariantError
from preble_jax.kv.event_log import EventLog
from preble_jax.kv.events import AllCleared, BlocksRemoved, BlocksStored
from preble_jax.kv.pages import PagePool
from preble_jax.kv.radix import Node, RadixTree


class SequencePages:
    """One request's pages in token order: `pages[:num_committed]` are cached and pinned, the rest are private.

    num_unchanged: `pages[:num_unchanged]` have not changed since whoever keeps a copy of them set it to `len(pages)`.
    """

    __slots__ = ("node", "num_committed", "num_unchanged", "pages")

    def __init__(self, pages: list[int], node: Node | None) -> None:
        self.pages = pages
        self.num_committed = len(pages)
        self.num_unchanged = 0
        self.node = node  # the deepest committed page, which carries this request's pin


class PrefixCache:
    """Page pool, radix tree and event log of one device group, kept consistent."""

    def __init__(self, num_pages: int, page_size: int, *, enabled: bool = True, generation: int = 0) -> None:
        self.page_size = page_size
        self.enabled = enabled
        self.pool = PagePool(num_pages)
        self.tree = RadixTree()
        self.events = EventLog(generation)
        self._num_private = 0
        self.num_evicted = 0  # since the start, to make room

    @property
    def num_available(self) -> int:
        """Pages that `extend` could hand out: free ones and those it may evict."""
        return self.pool.num_free + self.tree.num_evictable

    @property
    def num_cached(self) -> int:
        return len(self.tree)

    def match(self, hashes: Sequence[bytes]) -> int:
        """How many leading pages of the chain are cached. Changes nothing."""
        return self.tree.match(hashes) if self.enabled else 0

    def num_evictable_in(self, hashes: Sequence[bytes]) -> int:
        """How many pages of this cached chain nobody references: pinning it takes so many from `num_available`."""
        count = 0
        node = self.tree.get(hashes[-1]) if hashes else None
        while node is not None and node.refs == 0:
            count += 1
            node = node.parent
        return count

    def open(self, hashes: Sequence[bytes]) -> SequencePages:
        """Pins the longest cached prefix of the chain for a request. End it with `release`."""
        count = self.match(hashes)
        node = self.tree.get(hashes[count - 1]) if count else None
        if node is not None:
            self.tree.pin(node)
        return SequencePages(self.tree.path(node), node)

    def extend(self, held: SequencePages, num_pages: int) -> bool:
        """Appends private pages, evicting what must go. False (and nothing done) if so many cannot be had."""
        if num_pages > self.num_available:
            return False
        short = num_pages - self.pool.num_free
        if short > 0:
            removed = self.tree.evict(short)
            if len(removed) < short:
                raise InvariantError(f"prefix cache: {self.tree.num_evictable} pages evictable, but no leaf among them")
            self.pool.free([node.page for node in removed])
            self.num_evicted += short
            self.events.append(BlocksRemoved(tuple([node.block_hash for node in removed])))
        held.pages.extend(self.pool.allocate(num_pages))
        self._num_private += num_pages
        return True

    def commit(self, held: SequencePages, hashes: Sequence[bytes]) -> None:
        """The first `len(hashes)` pages are full and written: shares those that are not shared yet.

        Where the tree already has a page of that hash, the request goes over to it and its own copy is freed.
        """
        if not self.enabled or len(hashes) <= held.num_committed:
            return
        old, parent, first_new = held.node, held.node, held.num_committed
        while first_new < len(hashes) and (node := self.tree.get(hashes[first_new])) is not None:
            self.pool.free((held.pages[first_new],))
            held.pages[first_new] = node.page
            held.num_unchanged = min(held.num_unchanged, first_new)
            parent, first_new = node, first_new + 1
        new = hashes[first_new:]
        if new:
            held.node = self.tree.grow(new, parent, held.pages[first_new : len(hashes)])
            self.events.append(BlocksStored(tuple(new), parent.block_hash if parent else None))
        elif parent is not None:
            held.node = parent
            self.tree.pin(parent)
        self._num_private -= len(hashes) - held.num_committed
        held.num_committed = len(hashes)
        if old is not None:
            self.tree.unpin(old)

    def release(self, held: SequencePages) -> None:
        """Ends a request: its committed pages stay cached, the private ones are free at once."""
        private = held.pages[held.num_committed :]
        self.pool.free(private)
        self._num_private -= len(private)
        if held.node is not None:
            self.tree.unpin(held.node)
        held.pages, held.node, held.num_committed = [], None, 0

    def clear(self) -> bool:
        """Forgets every page nobody references. True if nothing is left."""
        removed = self.tree.evict(self.tree.num_evictable)
        if removed:
            self.pool.free([node.page for node in removed])
            hashes = tuple([node.block_hash for node in removed])
            self.events.append(BlocksRemoved(hashes) if len(self.tree) else AllCleared())
        return len(self.tree) == 0

    def validate(self) -> None:
        """free + cached + private = all, and the tree adds up. O(pages)."""
        self.pool.validate()
        self.tree.validate()
        total = self.pool.num_free + len(self.tree) + self._num_private
        if total != self.pool.num_pages:
            raise InvariantError(
                f"pages: free {self.pool.num_free} + cached {len(self.tree)} + private {self._num_private} = {total}, "
                f"expected {self.pool.num_pages}"
            )
        if len({node.page for node in self.tree}) != len(self.tree):
            raise InvariantError("pages: two cached nodes hold the same page")
