"""SGLang's cache_aware router (public behaviour of sglang-router and its successors): affinity while queues are even.

If the longest queue exceeds the shortest by more than `balance_abs` requests and by more than `balance_rel` times, the
shortest queue. Else, if the longest match covers more than `threshold` of the prompt, the group that holds it (of
several, the one of shortest queue). Else the shortest queue.

The router guesses what workers hold from what it sent them; here it reads the forest, which is told by KV events.
"""

from __future__ import annotations

from preble_jax.sched.placement.base import Cluster, PlacementPolicy, Proposal, Query, slots_of
from preble_jax.sched.placement.least_loaded import shortest_queue


class CacheAware(PlacementPolicy):
    """threshold: share of the prompt's tokens, 0..1. balance_abs: requests. balance_rel: times, >= 1."""

    def __init__(self, *, threshold: float, balance_abs: int, balance_rel: float) -> None:
        self._threshold = threshold
        self._balance_abs = balance_abs
        self._balance_rel = balance_rel

    def choose(self, query: Query, cluster: Cluster) -> Proposal:
        if query.levels and not self._uneven(query, cluster):
            mask, matched = query.levels[0]
            if matched > self._threshold * query.request.num_tokens:
                return Proposal([shortest_queue(mask, cluster)], "exploit")
        return Proposal([shortest_queue(query.eligible, cluster)], "explore")

    def _uneven(self, query: Query, cluster: Cluster) -> bool:
        queues = [cluster.at(slot).num_outstanding for slot in slots_of(query.eligible)]
        longest, shortest = max(queues), min(queues)
        return longest - shortest > self._balance_abs and longest > self._balance_rel * shortest
