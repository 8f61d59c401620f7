"""What the released Preble code keeps about prompts: a tree of them, to which groups each node is *allocated*, and the
load that nodes cause. Part of preble_released; E2 proper needs none of it.

An allocation is the scheduler's intention; whether a group still caches a node is not looked at. A node is *large* when
it is longer than everything above it. A request's load is booked on its nearest large node (here: its Prefix).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from preble_jax.sched.cost import CostModel
from preble_jax.sched.forest_nodes import Node, NodeTree
from preble_jax.sched.placement.base import slots_of
from preble_jax.sched.window import Window


@dataclass(eq=False, slots=True)
class Prefix:
    """The requests of the window whose nearest large node is `node`.

    missed, prompt: their pages, and of these the ones that no prompt before them had. waits: slot -> (time, expected
    wait in ns) of each. mask, cost_ns: what is booked now: so much on each group of the mask.
    """

    node: Node
    serial: int
    count: int = 0
    missed: int = 0
    prompt: int = 0
    mask: int = 0
    cost_ns: int = 0
    waits: defaultdict[int, deque[tuple[float, int]]] = field(default_factory=lambda: defaultdict(deque))


class ReleasedTree:
    """load_ns: slot -> load of all prefixes. shared, shared_ns: slot -> the prefixes of at least two requests that are
    booked there, and the load of these.

    Nodes that no request of the window used are forgotten (the released tree only grows). Prompts are cut to full
    pages. Of forest_nodes.Node, `groups` is the allocation here and `shares` counts requests of the window.
    """

    def __init__(self, cost: CostModel, window_s: float, page_size: int) -> None:
        self.load_ns: defaultdict[int, int] = defaultdict(int)
        self.shared: defaultdict[int, dict[Prefix, None]] = defaultdict(dict)
        self.shared_ns: defaultdict[int, int] = defaultdict(int)
        self._cost = cost
        self._page_size = page_size
        self._tree = NodeTree()
        self.root = self._tree.root
        self._prefixes: dict[Node, Prefix] = {}
        self._window: Window[tuple[Node, Prefix, int, int, int]] = Window(window_s)
        self._window_s = window_s
        self._num_prefixes = 0

    def insert(self, hashes: Sequence[bytes]) -> Node:
        """The node that ends where the prompt ends; the root if it has no full page (or is no chain of hashes: the
        scheduler refuses those it can tell, from a memory of its own). Every call must be followed by `record` of what
        it returned."""
        tree = self._tree
        depth = tree.depth_of(hashes)
        node = tree.node_of(hashes[depth - 1]) if depth else tree.root
        assert node is not None
        is_chain = not depth or (
            node.start < depth <= node.end and node.hashes[depth - 1 - node.start] == hashes[depth - 1]
        )
        if not is_chain or not tree.blocks.isdisjoint(hashes[depth:]):
            return tree.root
        if node is not tree.root:
            upper = tree.end_at(node, depth)
            if upper is not node:
                self._split(upper, node)
                node = upper
        return tree.attach(node, hashes[depth:]) if depth < len(hashes) else node

    def allocated(self, node: Node, eligible: int) -> int:
        """The nearest allocation to eligible groups, upwards from `node`; all of them if there is none."""
        return next((step.groups & eligible for step in _upwards(node) if step.groups & eligible), eligible)

    def record(self, leaf: Node, groups: int, slot: int, wait_ns: int, now: float) -> None:
        """A request whose prompt ends in `leaf` was sent to `slot`; its path is allocated to `groups`."""
        if leaf is self.root:
            return
        node = next(step for step in _upwards(leaf) if is_large(step))
        prefix = self._prefixes.get(node)
        if prefix is None:
            self._num_prefixes += 1
            prefix = self._prefixes[node] = Prefix(node, self._num_prefixes)
        prefix.count += 1
        prefix.missed += len(leaf.hashes)
        prefix.prompt += leaf.end
        prefix.waits[slot].append((now, wait_ns))
        self._window.add(now, (leaf, prefix, slot, len(leaf.hashes), leaf.end))
        for step in _upwards(leaf):
            step.groups |= groups
            step.shares[slot] = step.shares.get(slot, 0) + 1
            self._book(step)

    def expire(self, now: float) -> None:
        for leaf, prefix, slot, missed, prompt in self._window.expire(now):
            prefix.count -= 1
            prefix.missed -= missed
            prefix.prompt -= prompt
            waits = prefix.waits[slot]
            while waits and waits[0][0] + self._window_s <= now:
                waits.popleft()
            if not prefix.count:
                prefix.node.groups = 0
            self._book(prefix.node)
            for step in list(_upwards(leaf)):
                step.shares[slot] -= 1
                if not step.shares[slot]:
                    del step.shares[slot]
                if not step.shares and step is not self.root:
                    self._tree.detach(step)

    def stealable(self, slot: int) -> list[Prefix]:
        """Large shared prefixes booked on the group, cheapest first."""
        return sorted((p for p in self.shared[slot] if is_large(p.node)), key=lambda p: (p.cost_ns, p.serial))

    def wait_doubled(self, prefix: Prefix, slot: int, now: float) -> bool:
        """Whether the expected wait at least doubled, mean of half a window against mean of the half before it."""
        half = now - self._window_s / 2
        old = [wait for at, wait in prefix.waits[slot] if at < half]
        new = [wait for at, wait in prefix.waits[slot] if at >= half]
        return bool(old and new) and sum(new) * len(old) >= 2 * sum(old) * len(new)

    def replicate(self, prefix: Prefix, source: int, target: int) -> None:
        prefix.node.groups |= 1 << target
        prefix.waits.pop(source, None)
        self._book(prefix.node)

    def move(self, prefix: Prefix, target: int) -> None:
        """The prefix and everything below it, to one group."""
        below = [prefix.node]
        while below:
            step = below.pop()
            below += step.children.values()
            step.groups = 1 << target
            self._book(step)

    def _split(self, upper: Node, lower: Node) -> None:
        """Allocations were copied. What was booked stays with the lower part only if that is still large."""
        prefix = self._prefixes.get(lower)
        if prefix is not None and is_large(upper) and not is_large(lower):
            del self._prefixes[lower]
            self._prefixes[upper] = prefix
            prefix.node = upper
        self._book(upper)
        self._book(lower)

    def _book(self, node: Node) -> None:
        """Brings the loads up to date with a change of the node or its prefix: miss rate * requests * time to compute
        the node / number of groups it is allocated to, on each of these."""
        prefix = self._prefixes.get(node)
        if prefix is None:
            return
        for slot in slots_of(prefix.mask):
            self.load_ns[slot] -= prefix.cost_ns
            if prefix in self.shared[slot]:
                self.shared_ns[slot] -= prefix.cost_ns
                del self.shared[slot][prefix]
        prefix.mask = node.groups
        if not prefix.count:
            del self._prefixes[node]
            return
        node_ns = self._cost.prefill_ns(len(node.hashes) * self._page_size)
        prefix.cost_ns = prefix.missed * prefix.count * node_ns // (prefix.prompt * max(1, prefix.mask.bit_count()))
        for slot in slots_of(prefix.mask):
            self.load_ns[slot] += prefix.cost_ns
            if prefix.count > 1:
                self.shared_ns[slot] += prefix.cost_ns
                self.shared[slot][prefix] = None


def is_large(node: Node) -> bool:
    return len(node.hashes) > node.start


def _upwards(node: Node | None) -> Iterator[Node]:
    """The node and all above it, the root included."""
    while node is not None:
        yield node
        node = node.parent
