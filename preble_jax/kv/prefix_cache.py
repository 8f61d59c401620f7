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

    node: the run whose last page is the deepest committed one, and which carries this request's pin (of the root while
    nothing is committed); None after `release`.
    num_unchanged: `pages[:num_unchanged]` have not changed since whoever keeps a copy of them set it to `len(pages)`.
    """

    __slots__ = ("node", "num_committed", "num_unchanged", "pages")

    def __init__(self, pages: list[int], node: Node) -> None:
        self.pages = pages
        self.num_committed = len(pages)
        self.num_unchanged = 0
        self.node: Node | None = node


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
        return self.tree.find(hashes)[1] if self.enabled else 0

    def num_evictable_in(self, hashes: Sequence[bytes]) -> int:
        """How many pages of this cached chain nobody references: pinning it takes so many from `num_available`."""
        node, end = self.tree.find(hashes)
        count = 0
        while node.refs == 0 and node.parent is not None:
            count += end - node.start
            node, end = node.parent, node.start
        return count

    def open(self, hashes: Sequence[bytes]) -> SequencePages:
        """Pins the longest cached prefix of the chain for a request. End it with `release`."""
        tree = self.tree
        node, depth = tree.find(hashes if self.enabled else ())
        node = tree.end_at(node, depth)
        tree.pin(node)
        return SequencePages(tree.path(node), node)

    def extend(self, held: SequencePages, num_pages: int) -> bool:
        """Appends private pages, evicting what must go. False (and nothing done) if so many cannot be had."""
        short = num_pages - self.pool.num_free
        if short > self.tree.num_evictable:
            return False
        if short > 0:
            pages, hashes = self.tree.evict(short)
            if len(pages) < short:
                raise InvariantError(f"prefix cache: {self.tree.num_evictable} pages evictable, but no leaf among them")
            self.pool.free(pages)
            self.num_evicted += short
            self.events.append(BlocksRemoved(tuple(hashes)))
        held.pages.extend(self.pool.allocate(num_pages))
        self._num_private += num_pages
        return True

    def commit(self, held: SequencePages, hashes: Sequence[bytes], num_full: int | None = None) -> None:
        """The first `num_full` pages (None: `len(hashes)`) are full and written: shares those not shared yet.

        Where the tree already has a page of that hash, the request goes over to it and its own copy is freed.
        """
        num_full = len(hashes) if num_full is None else num_full
        first_new = held.num_committed
        if not self.enabled or num_full <= first_new:
            return
        tree, old = self.tree, held.node
        assert old is not None
        node = old
        if hashes[first_new] in old.children:
            node, depth = tree.find(hashes[:num_full], below=old)
            node = tree.end_at(node, depth)
            self.pool.free(held.pages[first_new:depth])
            held.pages[first_new:depth] = tree.path(node)[first_new:]
            held.num_unchanged = min(held.num_unchanged, first_new)
            first_new = depth
        self._num_private -= num_full - held.num_committed
        held.num_committed = num_full
        new = hashes[first_new:num_full]
        if new:
            parent = node.hashes[-1] if node.hashes else None
            held.node = tree.grow(node, new, held.pages[first_new:num_full], moves_pin=node is old)
            self.events.append(BlocksStored(tuple(new), parent))
        else:
            held.node = node
            tree.pin(node)
        if node is not old:
            tree.unpin(old)

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
        pages, hashes = self.tree.evict(self.tree.num_evictable)
        if pages:
            self.pool.free(pages)
            self.events.append(BlocksRemoved(tuple(hashes)) if len(self.tree) else AllCleared())
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
        if len({page for node in self.tree for page in node.pages}) != len(self.tree):
            raise InvariantError("pages: a page is cached twice")
