"""The radix tree of cached pages: one node a page, found by its block hash.

A block hash names a page *and* everything before it, so a path needs no descent: a prefix of n pages is cached exactly
if its n-th hash is in the tree (a node's ancestors are always there, because only leaves are evicted). Finding the
longest cached prefix is therefore a binary search over the chain of hashes.

Pins and recency are kept at the deepest node of a path only; ancestors are covered by having children:
- `refs` = pins on the node + children with refs > 0. A node with refs 0 is *evictable* once its subtree is.
- `last_used` of an inner node does not count the uses of its children, and need not: it becomes a leaf when its last
  child goes, as the least recently used leaf of all. Unless the node was used by itself since, it is next in any case.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence

from preble_jax.errors import InvariantError


class Node:
    """One cached page."""

    __slots__ = ("block_hash", "last_used", "num_children", "page", "parent", "pins", "refs")

    def __init__(self, block_hash: bytes, parent: Node | None, page: int) -> None:
        self.block_hash = block_hash
        self.parent = parent
        self.page = page
        self.pins = 0
        self.refs = 0
        self.num_children = 0
        self.last_used = 0


class RadixTree:
    """Cached pages with reference counts and leaf-first LRU eviction. Page ids are the caller's."""

    def __init__(self) -> None:
        self._nodes: dict[bytes, Node] = {}
        self._clock = 0
        self._evictable: list[tuple[int, bytes]] = []  # heap; stale entries are skipped when popped
        self.num_evictable = 0
        self.on_change: Callable[[Sequence[bytes]], None] | None = None  # told of all pages that have come or gone

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Node]:
        """Parents before children."""
        return iter(self._nodes.values())

    def get(self, block_hash: bytes) -> Node | None:
        return self._nodes.get(block_hash)

    def match(self, hashes: Sequence[bytes]) -> int:
        """How many leading pages of the chain `hashes` are cached."""
        low, high = 0, len(hashes)
        while low < high:
            middle = (low + high + 1) // 2
            if hashes[middle - 1] in self._nodes:
                low = middle
            else:
                high = middle - 1
        return low

    def path(self, node: Node | None) -> list[int]:
        """The pages from the root to `node`."""
        pages: list[int] = []
        while node is not None:
            pages.append(node.page)
            node = node.parent
        pages.reverse()
        return pages

    def insert(self, block_hash: bytes, parent: Node | None, page: int) -> Node:
        """Adds a page below `parent` (None: a first page), which the caller has pinned."""
        if block_hash in self._nodes:
            raise InvariantError(
                f"radix tree: page {page} inserted under a hash that page {self._nodes[block_hash].page} has"
            )
        node = Node(block_hash, parent, page)
        self._nodes[block_hash] = node
        if parent is not None:
            parent.num_children += 1
        self.num_evictable += 1
        self._touch(node)
        self._offer(node)
        if self.on_change is not None:
            self.on_change((block_hash,))
        return node

    def grow(self, hashes: Sequence[bytes], parent: Node | None, pages: Sequence[int]) -> Node:
        """Adds a chain of pages, at least one, below `parent`, as `insert` would one by one; returns the last, pinned.

        No page of a chain can be in the tree when its first one is not.
        """
        nodes, clock, node = self._nodes, self._clock, parent
        if hashes[0] in nodes:
            raise InvariantError(
                f"radix tree: page {pages[0]} inserted under a hash that page {nodes[hashes[0]].page} has"
            )
        if parent is not None:
            parent.num_children += 1
            self._add_ref(parent)
        for block_hash, page in zip(hashes, pages, strict=True):
            node = nodes[block_hash] = Node(block_hash, node, page)
            clock += 1
            node.last_used = clock
            node.refs = node.num_children = 1
        assert node is not None
        self._clock = clock
        node.pins, node.num_children = 1, 0
        self._touch(node)
        if self.on_change is not None:
            self.on_change(hashes)
        return node

    def pin(self, node: Node) -> None:
        """Keeps `node` and its ancestors from eviction, and marks them as just used."""
        node.pins += 1
        self._touch(node)
        self._add_ref(node)

    def unpin(self, node: Node) -> None:
        if node.pins == 0:
            raise InvariantError(f"radix tree: page {node.page} unpinned more often than pinned")
        node.pins -= 1
        self._touch(node)
        self._drop_ref(node)

    def evict(self, num: int = 1) -> list[Node]:
        """Removes the least recently used leaf that nobody references, again and again: `num` of them, or all."""
        heap, nodes, removed, left = self._evictable, self._nodes, list[Node](), num
        while heap and left > 0:
            last_used, block_hash = heapq.heappop(heap)
            node = nodes.get(block_hash)
            if node is None or node.refs or node.num_children or node.last_used != last_used:
                continue
            while True:
                del nodes[node.block_hash]
                removed.append(node)
                left -= 1
                parent = node.parent
                if parent is None:
                    break
                parent.num_children -= 1
                if parent.refs or parent.num_children:
                    break
                offer = (parent.last_used, parent.block_hash)
                if not left or (heap and heap[0] < offer):
                    heapq.heappush(heap, offer)
                    break
                node = parent  # it is next: no need to offer it first
        self.num_evictable -= len(removed)
        if removed and self.on_change is not None:
            self.on_change([node.block_hash for node in removed])
        return removed

    def _touch(self, node: Node) -> None:
        self._clock += 1
        node.last_used = self._clock

    def _offer(self, node: Node) -> None:
        if node.refs or node.num_children:
            return
        if len(self._evictable) > 2 * len(self._nodes) + 64:  # mostly stale: hot leaves are offered at each unpin
            self._evictable = [
                (n.last_used, n.block_hash) for n in self._nodes.values() if not (n.refs or n.num_children)
            ]
            heapq.heapify(self._evictable)
        else:
            heapq.heappush(self._evictable, (node.last_used, node.block_hash))

    def _add_ref(self, node: Node | None) -> None:
        while node is not None:
            node.refs += 1
            if node.refs > 1:
                return
            self.num_evictable -= 1
            node = node.parent

    def _drop_ref(self, node: Node | None) -> None:
        while node is not None:
            node.refs -= 1
            if node.refs > 0:
                return
            self.num_evictable += 1
            if not node.num_children:
                self._offer(node)
            node = node.parent

    def validate(self) -> None:
        """Raises InvariantError if counts and links do not add up. O(pages)."""
        children: dict[bytes, int] = {}
        active: dict[bytes, int] = {}
        for node in self._nodes.values():
            if node.parent is not None:
                if self._nodes.get(node.parent.block_hash) is not node.parent:
                    raise InvariantError(f"radix tree: page {node.page} outlived its parent page {node.parent.page}")
                children[node.parent.block_hash] = children.get(node.parent.block_hash, 0) + 1
                active[node.parent.block_hash] = active.get(node.parent.block_hash, 0) + (node.refs > 0)
        for block_hash, node in self._nodes.items():
            if node.num_children != children.get(block_hash, 0):
                raise InvariantError(
                    f"radix tree: {node.num_children} children counted, {children.get(block_hash, 0)} found"
                )
            if node.refs != node.pins + active.get(block_hash, 0):
                raise InvariantError(
                    f"radix tree: refs {node.refs} != pins {node.pins} + {active.get(block_hash, 0)} children"
                )
        evictable = sum(node.refs == 0 for node in self._nodes.values())
        if evictable != self.num_evictable:
            raise InvariantError(f"radix tree: {self.num_evictable} evictable counted, {evictable} found")
