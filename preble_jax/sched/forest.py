"""Who holds which prefix: one forest for all device groups, fed by KV events and by placements.

A block is held by a group *confirmed* (its KV events said so) or *optimistic* (a request was placed there, so it soon
will be); optimistic entries become confirmed by an event or expire. The forest also remembers, for the window H, how
many requests used each prefix on each group, and in which order prefixes were last used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from preble_jax.errors import InvalidRequestError
from preble_jax.kv.events import BlocksRemoved, BlocksStored, KVEvent
from preble_jax.sched.forest_nodes import ANY, Node, NodeTree
from preble_jax.sched.recency import Recency


class Forest:
    """At most `max_blocks` blocks; beyond that the least recently used are forgotten, leaves first, whoever holds them.

    Invariants (checked by preble_jax.sched.forest_check.validate_forest): what a group holds is closed under parents,
    and so is what it holds confirmed; a node that nobody holds and no request of the window used does not exist; no
    two neighbours could be one node.
    """

    def __init__(self, *, max_blocks: int, optimistic_ttl_s: float) -> None:
        self.tree = NodeTree()
        self.max_blocks = max_blocks
        self.num_held: list[int] = []  # by slot: blocks held, optimistic ones included
        self.num_forgotten = 0
        self.num_ignored = 0  # stored chains whose parent had been forgotten, or that are no chain
        self._optimistic_ttl_s = optimistic_ttl_s
        self._optimistic: deque[tuple[float, int, Node]] = deque()
        self._recency: list[Recency] = []
        self._recency_any = Recency(ANY)
        self._tick = 0

    def __len__(self) -> int:
        return len(self.tree)

    def add_slot(self) -> int:
        self.num_held.append(0)
        self._recency.append(Recency(len(self._recency)))
        return len(self._recency) - 1

    # --- placements

    def find(self, hashes: Sequence[bytes]) -> tuple[Node, int]:
        """(node, depth): the longest known beginning of the chain ends in `node`, `depth` blocks from the root.

        Changes nothing. Raises InvalidRequestError when the hashes cannot be a chain.
        """
        depth = self.tree.depth_of(hashes)
        node = self.tree.node_of(hashes[depth - 1]) if depth else self.tree.root
        assert node is not None
        if depth and not (node.start < depth <= node.end and node.hashes[depth - 1 - node.start] == hashes[depth - 1]):
            raise InvalidRequestError(
                f"block_hashes: expected a chain (each hash made from the one before), got block {depth - 1} at the "
                "place of another block; hash the prompt with preble_jax.kv.hashing"
            )
        if depth < len(hashes):
            self._check_new(hashes[depth:])
        return node, depth

    def assign(self, hashes: Sequence[bytes], found: tuple[Node, int], slot: int, now: float) -> Node:
        """Records that a request with this chain goes to `slot`: use, share and optimistic entry for its whole path.

        found: what `find` said about `hashes`, with nothing changed since. Returns the node of the last block (root
        when there is none), to be given to `unshare` when the request leaves the window.
        """
        tree = self.tree
        node, depth = found
        if node is not tree.root:
            node = tree.end_at(node, depth)
        if depth < len(hashes):
            node = tree.attach(node, hashes[depth:])
        if node is tree.root:
            return node
        self._tick = tick = self._tick + 1
        bit, deadline = 1 << slot, now + self._optimistic_ttl_s
        step, optimistic = node, False
        while step.parent is not None:
            step.last[slot] = step.last[ANY] = tick
            step.shares[slot] = step.shares.get(slot, 0) + 1
            if not step.groups & bit:
                step.groups |= bit
                self.num_held[slot] += len(step.hashes)
                step.pending[slot] = deadline
                optimistic = True
            elif slot in step.pending:
                step.pending[slot] = deadline
                optimistic = True
            step = step.parent
        if optimistic:
            self._optimistic.append((deadline, slot, node))
        self._recency[slot].touch(node, tick)
        self._recency_any.touch(node, tick)
        self.tree.merge_path(node)
        self._enforce_budget()
        return node

    def unshare(self, node: Node, slot: int) -> None:
        """A request that `assign` recorded leaves the window."""
        path: list[Node] = []
        step: Node | None = node
        while step is not None and step is not self.tree.root:
            left = step.shares[slot] - 1
            if left:
                step.shares[slot] = left
            else:
                del step.shares[slot]
            path.append(step)
            step = step.parent
        self._tidy_all(path)

    def expire(self, now: float) -> None:
        """Drops optimistic entries whose time is up."""
        queue = self._optimistic
        changed: list[Node] = []
        while queue and queue[0][0] <= now:
            _, slot, leaf = queue.popleft()
            step: Node | None = leaf
            while step is not None:
                if step.groups >> slot & 1:
                    # Confirmed or used again later; then the nodes above are so too.
                    if step.pending.get(slot, float("inf")) > now:
                        break
                    self._release(step, slot)
                    changed.append(step)
                step = step.parent
        self._tidy_all(changed)

    # --- KV events

    def apply(self, event: KVEvent, slot: int) -> None:
        if isinstance(event, BlocksStored):
            self.store(event.hashes, event.parent, slot)
        elif isinstance(event, BlocksRemoved):
            self.remove(event.hashes, slot)
        else:
            self.clear(slot)

    def store(self, hashes: Sequence[bytes], parent: bytes | None, slot: int) -> None:
        """The group holds this chain now, and, since trees are closed under parents, everything above it.

        A chain below a block that was forgotten is ignored: without its place it is of no use to placement.
        """
        if not hashes:
            return
        tree = self.tree
        known = tree.depth_of(hashes)
        last_known = hashes[known - 1] if known else parent
        node = tree.root if last_known is None else tree.node_of(last_known)
        if node is None or not self._is_new_chain(hashes[known:]):
            self.num_ignored += 1
            return
        new = hashes[known:]
        if last_known is not None and node.hashes[-1] != last_known:
            if not new and node.groups >> slot & 1 and slot not in node.pending:
                return  # all of it is confirmed: nothing to split for
            node = tree.end_at(node, node.start + node.hashes.index(last_known) + 1)
        if new:
            node = self._grow(node, new, slot)
        elif node.groups >> slot & 1 and slot not in node.pending:
            return
        self._confirm(node, slot)
        self._enforce_budget()

    def remove(self, hashes: Sequence[bytes], slot: int) -> None:
        """The group evicted these blocks. What it held below them is unreachable, and dropped with them."""
        tree, bit = self.tree, 1 << slot
        by_node: dict[Node, list[bytes]] = {}
        at = 0
        while at < len(hashes):
            node = tree.node_of(hashes[at])
            num = 1
            if node is not None and node.groups & bit:
                # Mostly it is a run's end, as far as the batch goes: one comparison in place of a look-up a block.
                num = min(len(node.hashes), len(hashes) - at)
                if num > 1 and tuple(node.hashes[: -num - 1 : -1]) != tuple(hashes[at : at + num]):
                    num = 1
                by_node.setdefault(node, []).extend(hashes[at : at + num])
            at += num
        changed: list[Node] = []
        for node, blocks in by_node.items():
            cut = len(node.hashes) - len(blocks)
            if cut < 0 or node.hashes[cut] != blocks[-1]:  # not the leaves-first tail of a run
                cut = min(map(node.hashes.index, blocks))
            if cut:
                changed.append(tree.end_at(node, node.start + cut))
            doomed = [node]
            while doomed:
                step = doomed.pop()
                if step.groups & bit:
                    doomed.extend(step.children.values())
                    self._release(step, slot)
                    changed.append(step)
        self._tidy_all(changed)

    def clear(self, slot: int) -> None:
        """The group holds nothing, optimistic entries included."""
        nodes = list(self._recency[slot].coldest())
        for node in nodes:
            self._release(node, slot)
        self._recency[slot].clear()
        self._tidy_all(nodes)

    # --- questions

    def holders(self, found: tuple[Node, int], limit: int, groups: int) -> list[tuple[int, int]]:
        """[(mask, blocks)], deepest first: which of `groups` hold how much of the chain, `limit` blocks at most.

        found: what `find` said. Each group appears once, with its longest match; groups that hold nothing do not.
        """
        node, depth = found[0], min(found[1], limit)
        levels: list[tuple[int, int]] = []
        while node.parent is not None and groups:
            mask = node.groups & groups
            if mask and node.start < depth:
                levels.append((mask, min(depth, node.end)))
                groups ^= mask
            node = node.parent
        return levels

    def coldest(self, slot: int) -> Iterator[Node]:
        """Nodes in the order in which the group's LRU would evict them, as far as the forest can tell."""
        self._recency[slot].drop_stale()
        return self._recency[slot].coldest()

    def blocks(self, slot: int, *, confirmed_only: bool = False) -> set[bytes]:
        """All blocks the group holds. O(blocks)."""
        return {
            block
            for node in self._recency[slot].coldest()
            if not (confirmed_only and slot in node.pending)
            for block in node.hashes
        }

    # --- inside

    def _is_new_chain(self, hashes: Sequence[bytes]) -> bool:
        """`hashes` begins where what is known of a longer chain ends: the last one is not known."""
        return len(hashes) < 2 or (len(set(hashes)) == len(hashes) and self.tree.blocks.isdisjoint(hashes))

    def _check_new(self, hashes: Sequence[bytes]) -> None:
        if not self._is_new_chain(hashes):
            raise InvalidRequestError(
                "block_hashes: expected a chain (each hash made from the one before), got a hash twice or below "
                "another parent; hash the prompt with preble_jax.kv.hashing"
            )

    def _grow(self, parent: Node, hashes: Sequence[bytes], slot: int) -> Node:
        """New blocks of one group below `parent`, where possible in the same node (output grows page by page)."""
        if parent is self.tree.root or parent.children or parent.groups != 1 << slot or parent.shares:
            return self.tree.attach(parent, hashes)
        self.tree.extend(parent, hashes)
        self.num_held[slot] += len(hashes)
        return parent

    def _confirm(self, node: Node, slot: int) -> None:
        """Marks the path as held for certain, and as just used: a group stores what it computes."""
        self._tick = tick = self._tick + 1
        bit = 1 << slot
        step = node
        while step.parent is not None:
            step.last[slot] = step.last[ANY] = tick
            if not step.groups & bit:
                step.groups |= bit
                self.num_held[slot] += len(step.hashes)
            elif step.pending:
                step.pending.pop(slot, None)
            step = step.parent
        self._recency[slot].touch(node, tick)
        self._recency_any.touch(node, tick)
        self.tree.merge_path(node)

    def _release(self, node: Node, slot: int) -> None:
        node.groups &= ~(1 << slot)
        node.pending.pop(slot, None)
        del node.last[slot]
        self.num_held[slot] -= len(node.hashes)

    def _tidy_all(self, nodes: list[Node]) -> None:
        tidy = self.tree.tidy
        for node in nodes:
            if node.alive:
                tidy(node)

    def _enforce_budget(self) -> None:
        tree = self.tree
        while len(tree) > self.max_blocks:
            self._recency_any.drop_stale()
            node = next(self._recency_any.coldest())
            parent = node.parent
            assert parent is not None
            for slot in list(node.last):
                if slot != ANY:
                    self._release(node, slot)
            self.num_forgotten += len(node.hashes)
            tree.detach(node)
            tree.tidy(parent)
