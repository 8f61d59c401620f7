"""Least loaded: the group with the fewest requests that were sent to it and have not ended ("join the shortest queue").
Knows nothing of prefixes or lengths. Requests are counted where they are sent, so no report's delay shows.
"""

from __future__ import annotations

from preble_jax.sched.placement.base import Cluster, PlacementPolicy, Proposal, Query, slots_of


class LeastLoaded(PlacementPolicy):
    def choose(self, query: Query, cluster: Cluster) -> Proposal:
        return Proposal([shortest_queue(query.eligible, cluster)], "explore")


def shortest_queue(mask: int, cluster: Cluster) -> int:
    """The slot of `mask` with the fewest outstanding requests; `rank` decides between equals. mask: not 0."""
    best_queue, best_rank, best_slot = -1, 0.0, -1
    for slot in slots_of(mask):
        group = cluster.at(slot)
        queue = group.num_outstanding
        if best_slot < 0 or queue < best_queue or (queue == best_queue and group.rank < best_rank):
            best_queue, best_rank, best_slot = queue, group.rank, slot
    return best_slot
