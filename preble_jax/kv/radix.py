"""The radix tree of cached pages: a node is a run of them.

A block hash names a page *and* everything before it. So a run is found by the hash of its first page, and is part of a
chain if its last hash stands at its place there: nothing is compared page by page, and no page has an entry of its own
anywhere. Nodes split where a chain ends or branches inside them; a run that one request alone holds grows in place.

Pins and recency are kept at the last page of a node only; what is above is covered by having children:
- `refs` = pins on the node + children with refs > 0. A node with refs 0 is *evictable* once its subtree is.
- `last_used` of a node does not count the uses of its children, and need not: it becomes a leaf when its last child
  goes, as the least recently used leaf of all. Unless the node was used by itself since, it is next in any case. The
  same holds for the pages of a node, none of which was used by itself: they go from the end on, one after the other.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter

from preble_jax.errors import InvariantError


class Node:
    """A run of cached pages: `hashes` and `pages`, parallel. start: pages above it.

    children: by the hash of their first page. added: (place in the run, tree's clock) of each chain that was added to
    it, by place. A node that left the tree has no pages.
    """

    __slots__ = ("added", "children", "hashes", "last_used", "pages", "parent", "pins", "refs", "start")

    def __init__(self, parent: Node | None, start: int, hashes: list[bytes], pages: list[int]) -> None:
        self.parent = parent
        self.start = start
        self.hashes = hashes
        self.pages = pages
        self.children: dict[bytes, Node] = {}
        self.added: list[tuple[int, int]] = []
        self.pins = 0
        self.refs = 0
        self.last_used = 0

    @property
    def end(self) -> int:
        """Pages from the root to its last one."""
        return self.start + len(self.pages)


class RadixTree:
    """Cached pages with reference counts and leaf-first LRU eviction. Page ids are the caller's."""

    def __init__(self) -> None:
        self.root = Node(None, 0, [], [])
        self.root.pins = self.root.refs = 1  # stays
        self._num_pages = 0
        self._num_nodes = 0
        self._clock = 0
        self._num_offers = 0
        self._evictable: list[tuple[int, int, Node]] = []  # heap; stale entries are skipped when popped
        self.num_evictable = 0
        self.on_change: Callable[[Sequence[bytes]], None] | None = None  # told of all pages that have come or gone

    def __len__(self) -> int:
        """Pages, not nodes."""
        return self._num_pages

    def __iter__(self) -> Iterator[Node]:
        """Parents before children."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def find(self, hashes: Sequence[bytes], below: Node | None = None) -> tuple[Node, int]:
        """(node, depth): the longest cached beginning of the chain has `depth` pages and ends in `node`, not always at
        its end; (root, 0) if there is none. below: a node that the chain is known to pass the end of."""
        node = below or self.root
        depth, length = node.start + len(node.hashes), len(hashes)
        while depth < length:
            child = node.children.get(hashes[depth])
            if child is None:
                break
            node, run = child, child.hashes
            low, high = 1, min(len(run), length - depth)
            if run[high - 1] == hashes[depth + high - 1]:
                low = high
            while low < high:
                middle = (low + high + 1) >> 1
                if run[middle - 1] == hashes[depth + middle - 1]:
                    low = middle
                else:
                    high = middle - 1
            depth += low
            if low < len(run):
                break
        return node, depth

    def end_at(self, node: Node, depth: int) -> Node:
        """The node of the same path that ends at `depth` exactly; splits `node` if `depth` lies inside it.

        The lower half stays the same object, because what refers to a node means its last page.
        """
        cut = depth - node.start
        if cut == len(node.pages):
            return node
        parent = node.parent
        assert parent is not None and 0 < cut < len(node.pages)
        upper = Node(parent, node.start, node.hashes[:cut], node.pages[:cut])
        parent.children[upper.hashes[0]] = upper
        del node.hashes[:cut], node.pages[:cut]
        upper.children[node.hashes[0]] = node
        node.parent, node.start = upper, depth
        upper.refs = int(node.refs > 0)
        upper.added = [(place, clock) for place, clock in node.added if place < cut]
        below = [(place - cut, clock) for place, clock in node.added if place >= cut]
        if not below or below[0][0]:  # a chain that was added in one goes across
            place, clock = upper.added[-1]
            below.insert(0, (0, clock + cut - place))
        node.added = below
        self._num_nodes += 1
        return upper

    def path(self, node: Node) -> list[int]:
        """The pages from the root to the end of `node`."""
        runs: list[list[int]] = []
        step: Node | None = node
        while step is not None:
            runs.append(step.pages)
            step = step.parent
        return [page for run in reversed(runs) for page in run]

    def chains(self) -> Iterator[tuple[list[bytes], bytes | None]]:
        """(hashes, hash of the page above them; None: nothing is) for all pages, in the order in which they were added.
        What was added one below the other, with nothing in between, is one chain."""
        parts: list[tuple[int, list[bytes], bytes | None]] = []
        for node in self:
            above = node.parent.hashes[-1] if node.parent is not None and node.parent.hashes else None
            end = len(node.hashes)
            for place, clock in reversed(node.added):
                parts.append((clock, node.hashes[place:end], node.hashes[place - 1] if place else above))
                end = place
        parts.sort(key=itemgetter(0))
        chain: list[bytes] = []
        top: bytes | None = None
        for _, hashes, above in parts:
            if chain and above != chain[-1]:
                yield chain, top
                chain = []
            if not chain:
                top = above
            chain += hashes
        if chain:
            yield chain, top

    def grow(self, node: Node, hashes: Sequence[bytes], pages: Sequence[int], *, moves_pin: bool = False) -> Node:
        """Adds a chain of pages, at least one, below the end of `node`; returns the node that ends with it, pinned.

        moves_pin: the caller gives up its pin on `node`. Where that is the only use of `node`, the run grows in place.
        No page of a chain can be in the tree when its first one is not.
        """
        if hashes[0] in node.children:
            raise InvariantError(
                f"radix tree: page {pages[0]} inserted under a hash that page {node.children[hashes[0]].pages[0]} has"
            )
        added = self._clock + 1
        self._clock += len(hashes)  # a tick a page: parts of the chain can be told by age when it is split
        self._num_pages += len(hashes)
        if moves_pin and node.pins == node.refs == 1 and not node.children:
            node.added.append((len(node.pages), added))
            node.hashes += hashes
            node.pages += pages
            self._touch(node)
            last = node
        else:
            last = node.children[hashes[0]] = Node(node, node.end, list(hashes), list(pages))
            self._num_nodes += 1
            last.added.append((0, added))
            last.pins = last.refs = 1
            self._touch(last)
            self._add_ref(node)
            if moves_pin:
                self.unpin(node)
        if self.on_change is not None:
            self.on_change(hashes)
        return last

    def pin(self, node: Node) -> None:
        """Keeps `node` and its ancestors from eviction, and marks them as just used."""
        node.pins += 1
        self._touch(node)
        self._add_ref(node)

    def unpin(self, node: Node) -> None:
        if node.pins == 0:
            raise InvariantError(f"radix tree: page {node.pages[-1]} unpinned more often than pinned")
        node.pins -= 1
        self._touch(node)
        self._drop_ref(node)

    def evict(self, num: int = 1) -> tuple[list[int], list[bytes]]:
        """Removes the least recently used leaf page that nobody references, again and again: `num` of them, or all.

        Returns (pages, hashes) of what was removed, leaves first."""
        heap, pages, hashes, left = self._evictable, list[int](), list[bytes](), num
        while heap and left > 0:
            last_used, _, node = heapq.heappop(heap)
            if node.last_used != last_used or node.refs or node.children or not node.pages:
                continue
            while True:
                if len(node.pages) > left:
                    pages += node.pages[: -left - 1 : -1]
                    hashes += node.hashes[: -left - 1 : -1]
                    del node.pages[-left:], node.hashes[-left:]
                    while node.added[-1][0] >= len(node.pages):
                        node.added.pop()
                    left = 0
                    self._push(node)
                    break
                parent = node.parent
                assert parent is not None
                del parent.children[node.hashes[0]]
                left -= len(node.pages)
                pages += reversed(node.pages)
                hashes += reversed(node.hashes)
                node.pages, node.hashes = [], []
                self._num_nodes -= 1
                if parent.refs or parent.children:
                    break
                if not left or (heap and heap[0][0] < parent.last_used):
                    self._push(parent)
                    break
                node = parent  # it is next: no need to offer it first
        self._num_pages -= len(pages)
        self.num_evictable -= len(pages)
        if pages and self.on_change is not None:
            self.on_change(hashes)
        return pages, hashes

    def _touch(self, node: Node) -> None:
        self._clock += 1
        node.last_used = self._clock

    def _push(self, node: Node) -> None:
        self._num_offers += 1  # no two entries are equal: nodes are not compared
        heapq.heappush(self._evictable, (node.last_used, self._num_offers, node))

    def _offer(self, node: Node) -> None:
        if len(self._evictable) > 2 * self._num_nodes + 64:  # mostly stale: hot leaves are offered at each unpin
            leaves = [n for n in self if not (n.refs or n.children)]
            self._evictable = [(n.last_used, number, n) for number, n in enumerate(leaves)]
            heapq.heapify(self._evictable)
            self._num_offers = len(leaves)
        else:
            self._push(node)

    def _add_ref(self, node: Node | None) -> None:
        while node is not None:
            node.refs += 1
            if node.refs > 1:  # so it is with the root
                return
            self.num_evictable -= len(node.pages)
            node = node.parent

    def _drop_ref(self, node: Node | None) -> None:
        while node is not None:
            node.refs -= 1
            if node.refs > 0:
                return
            self.num_evictable += len(node.pages)
            if not node.children:
                self._offer(node)
            node = node.parent

    def validate(self) -> None:
        """Raises InvariantError if counts and links do not add up. O(pages)."""
        num_nodes = num_pages = num_evictable = 0
        for node in self:
            num_nodes += 1
            num_pages += len(node.pages)
            num_evictable += len(node.pages) * (node.refs == 0)
            where = f"radix tree: run of {len(node.pages)} pages at {node.start}"
            if not node.pages or len(node.hashes) != len(node.pages):
                raise InvariantError(f"{where}: {len(node.hashes)} hashes")
            places = [place for place, _ in node.added]
            if not places or places[0] or places != sorted(set(places)) or places[-1] >= len(node.pages):
                raise InvariantError(f"{where}: chains were added at {places}")
        for node in (self.root, *self):
            for first, child in node.children.items():
                if child.parent is not node or child.hashes[0] != first or child.start != node.end:
                    raise InvariantError(f"radix tree: page {child.pages[0]} does not follow the page above it")
            active = sum(child.refs > 0 for child in node.children.values())
            if node.refs != node.pins + active:
                raise InvariantError(f"radix tree: refs {node.refs} != pins {node.pins} + {active} children")
        kept = (self._num_nodes, self._num_pages, self.num_evictable)
        if kept != (num_nodes, num_pages, num_evictable):
            raise InvariantError(
                f"radix tree: nodes, pages and evictable pages {kept} counted, {(num_nodes, num_pages, num_evictable)} "
                "found"
            )
