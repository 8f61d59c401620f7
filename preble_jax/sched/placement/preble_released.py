"""The global placement of the Preble code as released, which differs from the paper's E2 (see e2): a baseline that
keeps the release's faults where they shape decisions.

- "Load" of a group is what prefixes *allocated* to it cost (see released_tree), plus the decoding of its outstanding
  requests; there is no P, so a group that would have to compute the whole prompt costs no more than one that holds it.
- There is no decode-ratio branch. M counts only nodes longer than everything above them.
- Exploit when the prompt's new part is shorter than the known one. Of several groups, the *position* of the cheapest
  among them is used as the number of a group: the request may go to a group that was never one of them.
- A prompt that was seen whole counts by its last node's length, so repeating a long prompt explores again.
- Rebalancing moves whole prefixes, cheapest first, from the heaviest to the lightest group; it replicates only when the
  heavy group has exactly one shared prefix.

Not kept, because they do not shape decisions: the one lock, the O(history) sums, the wall clock, the tree that only
grows. Replaced, because the signal is not at hand: measured time to first token by the expected one (prefill in flight
on the group), decode times per node by the group's average.
"""

from __future__ import annotations

from preble_jax.sched.cost import CostModel
from preble_jax.sched.messages import Decision
from preble_jax.sched.placement.base import Cluster, PlacementPolicy, Proposal, Query, slots_of
from preble_jax.sched.placement.released_tree import ReleasedTree


class PrebleReleased(PlacementPolicy):
    """window_s: the window H. high_load: moves start when the heaviest load is at least this many times the lightest.
    min_requests: placements before the first move."""

    def __init__(self, cost: CostModel, *, window_s: float, high_load: float, min_requests: int) -> None:
        self._cost = cost
        self._window_s = window_s
        self._high_load = high_load
        self._min_requests = min_requests
        self._num_placed = 0
        self._tree: ReleasedTree | None = None

    def choose(self, query: Query, cluster: Cluster) -> Proposal:
        if self._tree is None:
            self._tree = ReleasedTree(self._cost, self._window_s, query.page_size)
        tree = self._tree
        tree.expire(query.now)
        groups = list(slots_of(query.eligible))
        leaf = tree.insert(query.request.block_hashes)
        num_new = len(leaf.hashes)

        def cheapest(slots: list[int]) -> int:
            costs = [
                self._load_ns(tree.load_ns[slot], slot, cluster)
                + cluster.eviction_ns(cluster.at(slot), num_new, query, large_only=True)
                for slot in slots
            ]
            return costs.index(min(costs))

        decision: Decision
        if num_new < leaf.start:
            decision, allocated = "exploit", tree.allocated(leaf, query.eligible)
        else:
            decision, allocated = "explore", 1 << groups[cheapest(groups)]
        candidates = list(slots_of(allocated))
        slot = candidates[0]
        if len(candidates) > 1:
            slot = groups[cheapest(candidates)]  # the fault: a position among candidates is used as a group's number
        tree.record(leaf, allocated, slot, self._wait_ns(slot, query, cluster), query.now)
        self._num_placed += 1
        if self._num_placed >= self._min_requests:
            self._rebalance(tree, groups, cluster, query.now)
        return Proposal([slot], decision)

    def _load_ns(self, prefixes_ns: int, slot: int, cluster: Cluster) -> int:
        """Of prefixes, and of decoding what is outstanding."""
        group = cluster.at(slot)
        if not group.num_outputs:
            return prefixes_ns
        return prefixes_ns + group.num_outstanding * self._cost.decode_ns(group.output_tokens / group.num_outputs)

    def _wait_ns(self, slot: int, query: Query, cluster: Cluster) -> int:
        """Expected time to first token."""
        cached = next((tokens for mask, tokens in query.levels if mask >> slot & 1), 0)
        return self._cost.prefill_ns(cluster.at(slot).queued_tokens + query.request.num_tokens - cached)

    def _rebalance(self, tree: ReleasedTree, groups: list[int], cluster: Cluster, now: float) -> None:
        """From the heaviest group to the lightest, then from the next heaviest to the same one, and so on."""
        loads = [(self._load_ns(tree.shared_ns[slot], slot, cluster), slot) for slot in groups]
        loads.sort(key=lambda load: -load[0])
        light_ns, light = loads[-1]
        for heavy_ns, heavy in loads[:-1]:
            if heavy_ns < self._high_load * light_ns:
                return
            prefixes = tree.stealable(heavy)
            if len(prefixes) == 1:
                (prefix,) = prefixes
                if not prefix.node.groups >> light & 1 and tree.wait_doubled(prefix, heavy, now):
                    light_ns += prefix.cost_ns // 2
                    tree.replicate(prefix, heavy, light)
                continue
            for prefix, cost_ns in [(prefix, prefix.cost_ns) for prefix in prefixes]:
                if heavy_ns - cost_ns < light_ns + cost_ns:
                    break
                heavy_ns -= cost_ns
                light_ns += cost_ns
                tree.move(prefix, light)
