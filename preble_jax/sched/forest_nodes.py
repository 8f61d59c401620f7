"""The forest's skeleton: path-compressed nodes over block hashes, found by any of their hashes.

Because a block hash names everything before it, a prompt's longest known beginning is found by binary search over its
chain of hashes, and the path to the root by following parents: nothing walks tokens, and a long document is one node.

A node is a maximal run of blocks that nothing tells apart: no branch inside, the same groups, the same uses. The tree
is kept in that canonical form: nodes split where a difference begins and merge again when it ends (`tidy`), so that
nodes do not depend on history.
"""

from __future__ import annotations

from collections.abc import KeysView, Sequence

ANY = -1  # the subject of Recency that stands for all groups together


class Node:
    """A run of blocks. Group sets are bit masks over slots (small integers, one a device group).

    start: blocks above this node. groups: who holds it, confirmed or optimistic. pending: slot -> time at which an
    optimistic entry expires; confirmed = groups without pending. shares: slot -> requests of the window that were
    placed there with this prefix. last: slot (or ANY) -> tick of the last use there; its slots are those of `groups`.
    spans: parts of the run that are looked up together, in order.
    A dead node (alive False) holds nothing any more, but keeps `parent`: what refers to it still finds the path.
    """

    __slots__ = ("alive", "children", "groups", "hashes", "last", "parent", "pending", "shares", "spans", "start")

    def __init__(self, start: int, hashes: list[bytes], parent: Node | None) -> None:
        self.start = start
        self.hashes = hashes
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        self.spans: list[Span] = []
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


class Span:
    """Some neighbouring blocks of `node`. Blocks are found by way of their span, so that they change nodes together."""

    __slots__ = ("node", "num")

    def __init__(self, node: Node, num: int) -> None:
        self.node = node
        self.num = num


_SMALL_SPAN = 4
"""Spans of up to that many blocks become part of the span beside them when two nodes merge."""


class NodeTree:
    """Structure only: lookup, attach, split, merge, prune. Meaning is added by Forest."""

    def __init__(self) -> None:
        self.root = Node(0, [], None)
        self.span_of: dict[bytes, Span] = {}

    def __len__(self) -> int:
        """Blocks, not nodes."""
        return len(self.span_of)

    @property
    def blocks(self) -> KeysView[bytes]:
        return self.span_of.keys()

    def node_of(self, block: bytes) -> Node | None:
        """None: it is not in the tree."""
        span = self.span_of.get(block)
        return None if span is None else span.node

    def depth_of(self, hashes: Sequence[bytes]) -> int:
        """How many leading blocks of the chain are known. O(log n): known blocks are closed under parents."""
        known = self.span_of
        low, high = 0, len(hashes)
        if high and hashes[-1] in known:
            return high
        while low < high:
            middle = (low + high + 1) >> 1
            if hashes[middle - 1] in known:
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
        del node.hashes[:cut]
        node.start = depth
        node.parent = upper
        upper.children[node.hashes[0]] = node
        parent.children[upper.hashes[0]] = upper
        self._split_spans(upper, node)
        return upper

    def attach(self, parent: Node, hashes: Sequence[bytes]) -> Node:
        """A new node below the end of `parent`; the hashes must be new and distinct."""
        node = Node(parent.end, list(hashes), parent)
        parent.children[node.hashes[0]] = node
        node.spans.append(Span(node, len(hashes)))
        self._register(hashes, node.spans[0])
        return node

    def extend(self, node: Node, hashes: Sequence[bytes]) -> None:
        """More blocks at the end of a childless node; they must be new and distinct."""
        span = node.spans[-1]
        span.num += len(hashes)
        self._register(hashes, span)
        node.hashes.extend(hashes)

    def _register(self, hashes: Sequence[bytes], span: Span) -> None:
        """These blocks are in `span` from now on."""
        span_of = self.span_of
        for block in hashes:  # faster than an update from a second dict
            span_of[block] = span

    def _split_spans(self, upper: Node, lower: Node) -> None:
        """`lower` has those of both."""
        spans, cut, whole = lower.spans, len(upper.hashes), 0
        while cut >= spans[whole].num:
            cut -= spans[whole].num
            whole += 1
        upper.spans, lower.spans = spans[:whole], spans[whole:]
        if cut:  # in the middle of one: the smaller part gets a span of its own
            across = spans[whole]
            rest = across.num - cut
            if cut < rest:
                across.num = rest
                upper.spans.append(Span(upper, cut))
                self._register(upper.hashes[-cut:], upper.spans[-1])
            else:
                across.num = cut
                upper.spans.append(across)
                lower.spans[0] = Span(lower, rest)
                self._register(lower.hashes[:rest], lower.spans[0])
        for span in upper.spans:
            span.node = upper

    def detach(self, node: Node) -> None:
        """Takes a childless node out."""
        assert node.parent is not None and not node.children
        del node.parent.children[node.hashes[0]]
        span_of = self.span_of
        for block in node.hashes:
            del span_of[block]
        node.alive = False
        node.hashes = []
        node.spans = []
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

    def merge_path(self, node: Node) -> None:
        """Brings a path, from `node` up, back to canonical form after it was used. All of it is held by somebody, and
        its last use is later than that of anything beside or below it: only neighbours on it can have become equal."""
        lower, upper = node, node.parent
        while upper is not None and (above := upper.parent) is not None:
            if len(upper.children) == 1 and upper.same_use(lower):
                self._merge(upper, lower)
            else:
                lower = upper
            upper = above

    def _merge(self, upper: Node, lower: Node) -> None:
        """Into `lower`, which stays the same object (see end_at)."""
        parent = upper.parent
        assert parent is not None
        self._join_spans(upper, lower)
        upper.hashes += lower.hashes
        lower.hashes = upper.hashes
        lower.start = upper.start
        lower.parent = parent
        parent.children[lower.hashes[0]] = lower
        upper.alive = False
        upper.hashes = []
        upper.spans = []
        upper.children = {}
        upper.groups = 0
        upper.last = {}
        upper.pending = {}

    def _join_spans(self, upper: Node, lower: Node) -> None:
        """`lower` gets those of both."""
        spans = upper.spans
        for span in spans:
            span.node = lower
        last, first = spans[-1], lower.spans[0]
        if first.num <= last.num and first.num <= _SMALL_SPAN:
            last.num += first.num
            self._register(lower.hashes[: first.num], last)
            spans += lower.spans[1:]
        elif last.num <= _SMALL_SPAN:
            first.num += last.num
            self._register(upper.hashes[-last.num :], first)
            spans[-1:] = lower.spans
        else:
            spans += lower.spans
        lower.spans = spans
