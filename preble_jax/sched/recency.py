"""Least-recently-used order over tree nodes, kept per device group without a list entry per node.

A *touch* marks a whole path, from a node up to the root, with one new tick. So it is enough to remember the deepest
node of each touch: walking up from it for as long as nodes still carry the touch's tick gives the nodes that were last
used by that touch, leaves first. Touches in order of ticks therefore give the order in which leaf-first LRU evicts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from preble_jax.sched.forest_nodes import Node


SWEPT_PER_TOUCH = 8


class Recency:
    """The order of one subject: a device group's slot, or ANY for the forest as a whole.

    Reads node.last[subject]: the tick of the node's last touch, absent where the subject does not hold the node.
    A record whose touch was overtaken on the whole path is stale; stale records are dropped when met at the cold end,
    and by a sweep of all when they could be more than half, a few at each touch, so that no touch waits for it.
    O(1) per touch, O(touches that are not stale) memory.
    """

    __slots__ = ("_purge_at", "_records", "_subject", "_sweep")

    def __init__(self, subject: int) -> None:
        self._subject = subject
        self._records: OrderedDict[Node, int] = OrderedDict()
        self._purge_at = 64
        self._sweep: list[Node] = []  # to be looked at

    def touch(self, node: Node, tick: int) -> None:
        """`node` is the deepest node of the path whose `last[subject]` was just set to `tick`."""
        records = self._records
        records[node] = tick
        records.move_to_end(node)
        if self._sweep:
            self._sweep_some()
        elif len(records) > self._purge_at:
            self._sweep = list(records)

    def coldest(self) -> Iterator[Node]:
        """Nodes the subject holds, least recently used first, children before parents. Nothing may change meanwhile."""
        records, subject = self._records, self._subject
        for leaf, at in records.items():
            node = self._first(leaf, at)
            while node is not None and node.last.get(subject) == at:
                yield node
                node = node.parent

    def drop_stale(self) -> None:
        """Drops stale records at the cold end."""
        records = self._records
        while records:
            leaf, at = next(iter(records.items()))
            if self._first(leaf, at) is not None:
                return
            del records[leaf]

    def clear(self) -> None:
        self._records.clear()
        self._sweep.clear()

    def _sweep_some(self) -> None:
        records, sweep = self._records, self._sweep
        for _ in range(min(SWEPT_PER_TOUCH, len(sweep))):
            leaf = sweep.pop()
            at = records.get(leaf)
            if at is not None and self._first(leaf, at) is None:
                del records[leaf]
        if not sweep:
            self._purge_at = 2 * len(records) + 64

    def _first(self, leaf: Node, at: int) -> Node | None:
        """The deepest node that this touch was the last to use; None if there is none."""
        node: Node | None = leaf
        while node is not None:
            tick = node.last.get(self._subject)
            if tick is not None:
                return node if tick == at else None
            node = node.parent
        return None
