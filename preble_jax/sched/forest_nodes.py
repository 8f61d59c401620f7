"""The forest's skeleton: path-compressed nodes over block hashes, found by any of their hashes.

Because a block hash names everything before it, a prompt's longest known beginning is found by binary search over its
chain of hashes, and the path to the root by following parents: nothing walks tokens, and a long document is one node.

A node is a maximal run of blocks that nothing tells apart: no branch inside, the same groups, the same uses. The tree
is kept in that canonical form: nodes split where a difference begins and merge again when it ends (`tidy`), so that
nodes do not depend on history.
"""

from __future__ import annotations

from collections.abc import Sequence

ANY = -1  # the subject of Recency that stands for all groups together


class Node:
    """A run of blocks. Group sets are bit masks over slots (small integers, one a device group).

    start: blocks above this node. groups: who holds it, confirmed or optimistic. pending: slot -> time at which an
    optimistic entry expires; confirmed = groups without pending. shares: slot -> requests of the window that were
    placed there with this prefix. last: slot (or ANY) -> tick of the last use there; its slots are those of `groups`.
    A dead node (alive False) holds nothing any more, but keeps `parent`: what refers to it still finds the path.
    """

    __slots__ = ("alive", "children", "groups", "hashes", "last", "parent", "pending", "shares", "start")

    def __init__(self, start: int, hashes: list[bytes], parent: Node | None) -> None:
        self.start = start
        self.hashes = hashes
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        self.groups = 0
        self.pending: dict[int, float] = {}
        self.shares: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.alive = True

    @property
    def end(self) -> int:
        return self.start + len(self.hashes)

    def same_use(self, other: Node) -> bool:
        return (
            self.groups == other.groups
            and self.last == other.last
            and self.shares == other.shares
            and self.pending == other.pending
        )


class NodeTree:
    """Structure only: lookup, attach, split, merge, prune. Meaning is added by Forest."""

    def __init__(self) -> None:
        self.root = Node(0, [], None)
        self.node_of: dict[bytes, Node] = {}

    def __len__(self) -> int:
        """Blocks, not nodes."""
        return len(self.node_of)

    def depth_of(self, hashes: Sequence[bytes]) -> int:
        """How many leading blocks of the chain are known. O(log n): known blocks are closed under parents."""
        node_of = self.node_of
        low, high = 0, len(hashes)
        if high and hashes[-1] in node_of:
            return high
        while low < high:
            middle = (low + high + 1) >> 1
            if hashes[middle - 1] in node_of:
                low = middle
            else:
                high = middle - 1
        return low

    def end_at(self, node: Node, depth: int) -> Node:
        """The node of the same path that ends at `depth` exactly; splits `node` if `depth` lies inside it.

        The lower half stays the same object, because what refers to a node means its last block.
        """
        cut = depth - node.start
        if cut == len(node.hashes):
            return node
        parent = node.parent
        assert parent is not None and 0 < cut < len(node.hashes)
        upper = Node(node.start, node.hashes[:cut], parent)
        upper.groups = node.groups
        upper.pending = dict(node.pending)
        upper.shares = dict(node.shares)
        upper.last = dict(node.last)
        node.hashes = node.hashes[cut:]
        node.start = depth
        node.parent = upper
        upper.children[node.hashes[0]] = node
        parent.children[upper.hashes[0]] = upper
        self.register(upper.hashes, upper)
        return upper

    def attach(self, parent: Node, hashes: Sequence[bytes]) -> Node:
        """A new node below the end of `parent`; the hashes must be new and distinct."""
        node = Node(parent.end, list(hashes), parent)
        parent.children[node.hashes[0]] = node
        self.register(hashes, node)
        return node

    def register(self, hashes: Sequence[bytes], node: Node) -> None:
        """These blocks are in `node` from now on."""
        node_of = self.node_of
        for block in hashes:  # faster than an update from a second dict
            node_of[block] = node

    def detach(self, node: Node) -> None:
        """Takes a childless node out."""
        assert node.parent is not None and not node.children
        del node.parent.children[node.hashes[0]]
        node_of = self.node_of
        for block in node.hashes:
            del node_of[block]
        node.alive = False
        node.hashes = []
        node.last = {}
        node.pending = {}
        node.groups = 0

    def tidy(self, node: Node) -> None:
        """Brings the neighbourhood of a node that changed back to canonical form: removes it when nobody holds it and
        no request of the window used it (then its parent likewise), merges runs that nothing tells apart."""
        root = self.root
        while node is not root and node.alive and not (node.children or node.groups or node.shares):
            parent = node.parent
            assert parent is not None
            self.detach(node)
            node = parent
        parent = node.parent
        if parent is None or not node.alive:
            return
        if len(node.children) == 1:
            (child,) = node.children.values()
            if child.same_use(node):
                self._merge(node, child)
                node = child
        if len(parent.children) == 1 and parent is not root and parent.same_use(node):
            self._merge(parent, node)

    def _merge(self, upper: Node, lower: Node) -> None:
        """Into `lower`, which stays the same object (see end_at)."""
        parent = upper.parent
        assert parent is not None
        self.register(upper.hashes, lower)
        lower.hashes = upper.hashes + lower.hashes
        lower.start = upper.start
        lower.parent = parent
        parent.children[lower.hashes[0]] = lower
        upper.alive = False
        upper.hashes = []
        upper.children = {}
        upper.groups = 0
        upper.last = {}
        upper.pending = {}
